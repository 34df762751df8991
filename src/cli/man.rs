//! `clip-csi man`: the manual pages.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;

use super::CliError;

/// Print the manual page, or write the pages of all commands
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi man | man -l -
  clip-csi man --dir /usr/local/share/man/man1")]
pub(super) struct ManArgs {
    /// Write a page per command into this directory instead
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl ManArgs {
    pub(super) fn run(self, command: clap::Command) -> Result<(), CliError> {
        if let Some(dir) = self.dir {
            return clap_mangen::generate_to(command, &dir).map_err(|e| CliError::io(dir.display().to_string(), &e));
        }
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page).map_err(|e| CliError::io("rendering the page", &e))?;
        io::stdout().write_all(&page).map_err(|e| CliError::output(&e))
    }
}
