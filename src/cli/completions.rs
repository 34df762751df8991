//! `clip-csi completions`: a completion script for a shell.

use std::io::{self, Write};

use clap::Args;
use clap_complete::Shell;

use super::CliError;

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  source <(clip-csi completions bash)
  clip-csi completions zsh > ~/.zfunc/_clip-csi
  clip-csi completions fish > ~/.config/fish/completions/clip-csi.fish")]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

impl CompletionsArgs {
    pub(super) fn run(self, mut command: clap::Command) -> Result<(), CliError> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "clip-csi", &mut script);
        io::stdout().write_all(&script).map_err(|e| CliError::output(&e))
    }
}
