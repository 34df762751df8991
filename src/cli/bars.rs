//! Progress: bars at a terminal, a line per finished piece elsewhere, and log lines that do not tear the bars.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{Global, human};
use crate::build::progress::Progress;

/// Pieces that are shorter than this are not worth a line of their own where there are no bars.
const WORTH_A_LINE: std::time::Duration = std::time::Duration::from_millis(500);

/// One set of bars per process, so that log lines know what to make room for.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Progress of one command.
#[derive(Debug)]
pub(super) struct Bars {
    mode: Mode,
    pieces: Mutex<Pieces>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Bars,
    Lines,
    Quiet,
}

#[derive(Debug, Default)]
struct Pieces {
    last: u64,
    open: HashMap<u64, Piece>,
}

#[derive(Debug)]
struct Piece {
    what: String,
    bytes: u64,
    since: Instant,
    bar: Option<ProgressBar>,
}

impl Bars {
    pub(super) fn new(global: Global) -> Self {
        let mode = match (global.quiet, io::stderr().is_terminal()) {
            (true, _) => Mode::Quiet,
            (false, true) => Mode::Bars,
            (false, false) => Mode::Lines,
        };
        Self { mode, pieces: Mutex::default() }
    }

    fn pieces(&self) -> std::sync::MutexGuard<'_, Pieces> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Bars {
    fn begin(&self, what: &str, total: Option<u64>) -> u64 {
        let bar = (self.mode == Mode::Bars).then(|| {
            let bar = BARS.add(total.map_or_else(ProgressBar::no_length, ProgressBar::new));
            bar.set_style(style(total.is_some()));
            bar.set_message(what.to_owned());
            bar
        });
        let mut pieces = self.pieces();
        pieces.last += 1;
        let id = pieces.last;
        pieces.open.insert(id, Piece { what: what.into(), bytes: 0, since: Instant::now(), bar });
        id
    }

    fn advance(&self, id: u64, bytes: u64) {
        if let Some(piece) = self.pieces().open.get_mut(&id) {
            piece.bytes += bytes;
            if let Some(bar) = &piece.bar {
                bar.inc(bytes);
            }
        }
    }

    fn end(&self, id: u64) {
        let Some(piece) = self.pieces().open.remove(&id) else { return };
        if let Some(bar) = piece.bar {
            bar.finish_and_clear();
        } else if self.mode == Mode::Lines && piece.since.elapsed() >= WORTH_A_LINE {
            eprintln!("{}: {} in {}", piece.what, human::bytes(piece.bytes), human::duration(piece.since.elapsed()));
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        for piece in self.pieces().open.values() {
            if let Some(bar) = &piece.bar {
                bar.finish_and_clear();
            }
        }
    }
}

fn style(bounded: bool) -> ProgressStyle {
    let template = if bounded {
        "{msg:30!} {wide_bar:.cyan/dim} {binary_bytes:>11}/{binary_total_bytes:11} {binary_bytes_per_sec:>13} {eta:>4}"
    } else {
        "{msg:30!} {spinner} {binary_bytes:>11} {binary_bytes_per_sec:>13}"
    };
    // A template that does not parse would be a mistake of this file: plain bars are then good enough.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Where log lines go at the shell: stderr, above the bars.
pub(super) fn log_writer() -> LogWriter {
    LogWriter
}

/// See [`log_writer`].
#[derive(Debug)]
pub(super) struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write_all(line)).map(|()| line.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_piece_is_no_harm_and_pieces_are_told_apart() {
        let bars = Bars { mode: Mode::Lines, pieces: Mutex::default() };
        let (a, b) = (bars.begin("a", None), bars.begin("b", Some(10)));
        assert_ne!(a, b);
        bars.advance(a, 3);
        bars.advance(99, 1);
        assert_eq!(bars.pieces().open[&a].bytes, 3);
        bars.end(a);
        bars.end(a);
        assert_eq!(bars.pieces().open.len(), 1);
    }
}
