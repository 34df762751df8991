//! The `clip-csi` command: parses, runs, prints the error, chooses the exit code. All of it lies in [`clip_csi::cli`].

fn main() -> std::process::ExitCode {
    clip_csi::cli::main()
}
