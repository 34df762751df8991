//! `clip-csi verify`: an archive against itself and against its data.

use std::time::Instant;

use clap::Args;

use super::args::OpenArgs;
use super::bars::Bars;
use super::{CliError, Global, human};
use crate::build::progress::Progress;

/// Check an archive; with --data every byte of its data
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi verify app.clip
  clip-csi verify --data s3://bucket/images/app.clip

Without --data the structure is checked: index, storage info, seek table, and that every file lies inside of its layer.
With it all layers (v2) or all data (v1) are fetched and checked against their digests. Exit code 3: something is wrong.")]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    open: OpenArgs,
    /// Fetch and check every byte
    #[arg(long)]
    data: bool,
}

impl VerifyArgs {
    pub(super) async fn run(self, global: Global) -> Result<(), CliError> {
        let started = Instant::now();
        let archive = self.open.open().await?;
        let done = {
            let bars = Bars::new(global);
            let id = bars.begin(&self.open.archive, None);
            let done = crate::fs::verify(&archive.opened, self.data, &|bytes| bars.advance(id, bytes)).await?;
            bars.end(id);
            done
        };
        for problem in &done.problems {
            eprintln!("clip-csi: {}", human::escaped(problem.as_bytes()));
        }
        let what = &self.open.archive;
        if !done.is_ok() {
            let n = done.problem_count;
            let problems = if n == 1 { "1 problem".to_owned() } else { format!("{} problems", human::count(n)) };
            return Err(CliError::Corrupt(format!("{what}: {problems}; build or fetch the archive again")));
        }
        let data = if self.data {
            format!("{} verified", human::bytes(done.verified_bytes))
        } else {
            "structure only, --data checks every byte".to_owned()
        };
        let blind = match done.unverifiable_bytes {
            0 => String::new(),
            n => format!("; no digest covers {}", human::bytes(n)),
        };
        println!(
            "{what}: good; {} names, {data}{blind}; {}",
            human::count(done.names),
            human::duration(started.elapsed())
        );
        Ok(())
    }
}
