//! The `clip-csi` command: one file per subcommand.

use std::process::ExitCode;

use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

mod archive;
mod args;
mod bars;
mod cat;
mod completions;
mod controller;
mod demo;
mod error;
mod extract;
mod human;
mod index;
mod inspect;
mod ls;
mod man;
mod mount;
mod node;
mod pull;
mod push;
mod service;
mod verify;

pub use error::{CliError, Exit};

/// Threads of the runtime at the shell and in the services: the work is waiting for the network and inflating spans.
const MAX_WORKERS: usize = 4;

/// Container images as read-only volumes, of which only the bytes that are read are fetched.
#[derive(Debug, Parser)]
#[command(
    name = "clip-csi",
    version,
    long_about = "Container images as read-only volumes, of which only the bytes that are read are fetched.\n\n\
        A v1 CLIP archive carries the image's data, a v2 archive is an index over the image's layers, which stay in \
        their registry. This command makes, shows, checks and mounts both, and is the CSI driver that makes them \
        volumes of Kubernetes pods."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

/// What every subcommand takes.
#[derive(Debug, Clone, Copy, Default, Args)]
struct Global {
    /// Say more: -v what happens and the causes of an error, -vv details, -vvv everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Show no progress
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Index(Box<index::IndexArgs>),
    Archive(archive::ArchiveArgs),
    Push(push::PushArgs),
    Pull(pull::PullArgs),
    Inspect(inspect::InspectArgs),
    Ls(ls::LsArgs),
    Cat(cat::CatArgs),
    Extract(extract::ExtractArgs),
    Verify(verify::VerifyArgs),
    Mount(mount::MountArgs),
    Node(node::NodeArgs),
    Controller(controller::ControllerArgs),
    Demo(demo::DemoArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

impl Command {
    /// Runs until a signal and ends in order by itself; everything else is dropped when the user interrupts it.
    fn handles_signals(&self) -> bool {
        matches!(self, Self::Mount(_) | Self::Node(_) | Self::Controller(_) | Self::Demo(_))
    }

    /// Sets up its own logging from its configuration.
    fn is_service(&self) -> bool {
        matches!(self, Self::Node(_) | Self::Controller(_))
    }
}

/// The subcommands as the top-level help groups them.
const GROUPS: &[(&str, &[&str])] = &[
    ("Make and store archives", &["index", "archive", "push", "pull"]),
    ("Look into archives", &["inspect", "ls", "cat", "extract", "verify"]),
    ("Mount", &["mount"]),
    ("Run the CSI driver", &["node", "controller"]),
    ("And", &["demo", "completions", "man", "help"]),
];

const EXAMPLES: &str = "\
Examples:
  clip-csi index python:3.12-slim -o python.clip       index an image (v2)
  clip-csi archive oci:./layout:latest -o app.clip     archive an image with its data (v1)
  clip-csi archive ./rootfs -o rootfs.clip             archive a directory (v1)
  clip-csi ls python.clip /usr/local/bin               list a directory of the image
  clip-csi cat python.clip /etc/os-release             print a file; only its bytes are fetched
  clip-csi push app.clip s3://bucket/images/           store an archive in S3
  clip-csi push app.clip ghcr.io/acme/app              or beside its image, where nodes find it
  clip-csi mount s3://bucket/images/app.clip /mnt      mount it until Ctrl-C
  clip-csi node --config /etc/clip-csi/config.yaml     run the node plugin

An IMAGE is registry/repo:tag, registry/repo@sha256:…, oci:DIR[:TAG] or oci-archive:FILE[:TAG].
An ARCHIVE is a path, file://PATH, s3://bucket/key[?endpoint=URL&region=R&path-style=true],
oci://registry/repository:tag or oci://registry/repository@sha256:….";

/// The command with its grouped help.
fn command() -> clap::Command {
    let command = Cli::command();
    let about = |name: &str| match name {
        "help" => Some("Print this help or the help of the given command".to_owned()),
        _ => command.find_subcommand(name).and_then(|c| c.get_about()).map(ToString::to_string),
    };
    let mut list = String::new();
    for (group, names) in GROUPS {
        list += &format!("\n{group}:\n");
        for name in *names {
            list += &format!("  {name:<12} {}\n", about(name).unwrap_or_default());
        }
    }
    let template = format!(
        "{{before-help}}{{about-with-newline}}\n{{usage-heading}} {{usage}}\n{list}\nOptions:\n{{options}}{{after-help}}"
    );
    command.help_template(template).after_help(format!("{EXAMPLES}\n\n{}", Exit::table()))
}

/// Parses the process's arguments, runs, prints the error, gives the exit code.
pub fn main() -> ExitCode {
    crate::memory::settle();
    let cli = match command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to be told where the terminal is gone.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { ExitCode::SUCCESS };
        }
    };
    let verbose = cli.global.verbose > 0;
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(text) = error.render(verbose) {
                eprintln!("clip-csi: {text}");
            }
            error.exit().into()
        }
    }
}

fn start(cli: Cli) -> Result<(), CliError> {
    // Files are made with exactly the modes that the code names; ring is the one TLS provider in the process.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if !cli.command.is_service() {
        crate::telemetry::init_shell(cli.global.verbose, bars::log_writer)?;
    }
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().clamp(2, MAX_WORKERS));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_name("clip-csi")
        .enable_all()
        .build()
        .map_err(|e| CliError::io("starting the runtime", &e))?;
    let outcome = runtime.block_on(async {
        if cli.command.handles_signals() {
            return run(cli).await;
        }
        tokio::select! {
            outcome = run(cli) => outcome,
            signal = error::signal() => Err(signal.map_or_else(|e| e, |_| CliError::Interrupted)),
        }
    });
    // Work on blocking threads sees that nobody waits for it any more; what does not is not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    outcome
}

async fn run(cli: Cli) -> Result<(), CliError> {
    let global = cli.global;
    match cli.command {
        Command::Index(args) => args.run(global).await,
        Command::Archive(args) => args.run(global).await,
        Command::Push(args) => args.run(global).await,
        Command::Pull(args) => args.run(global).await,
        Command::Inspect(args) => args.run().await,
        Command::Ls(args) => args.run().await,
        Command::Cat(args) => args.run().await,
        Command::Extract(args) => args.run(global).await,
        Command::Verify(args) => args.run(global).await,
        Command::Mount(args) => args.run().await,
        Command::Node(args) => args.run().await,
        Command::Controller(args) => args.run().await,
        Command::Demo(args) => args.run().await,
        Command::Completions(args) => args.run(command()),
        Command::Man(args) => args.run(command()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn the_grouped_help_names_every_subcommand_once() {
        let mut grouped: Vec<&str> = GROUPS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        grouped.sort_unstable();
        let command = command();
        let mut all: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).chain(["help"]).collect();
        all.sort_unstable();
        assert_eq!(grouped, all);
    }

    #[test]
    fn every_subcommand_and_argument_has_help() {
        for sub in command().get_subcommands() {
            assert!(sub.get_about().is_some(), "{} has no help", sub.get_name());
            for arg in sub.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {} has no help", sub.get_name(), arg.get_id());
            }
        }
    }
}
