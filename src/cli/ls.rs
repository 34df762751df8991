//! `clip-csi ls`: the tree, as `ls -l` shows it.

use std::io::{self, BufWriter, IsTerminal, Write};

use clap::Args;

use super::args::OpenArgs;
use super::{CliError, human};
use crate::archive::{Kind, NodeId, Tree};

/// List a directory or a file of an archive
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  clip-csi ls app.clip
  clip-csi ls app.clip /usr/bin
  clip-csi ls -R s3://bucket/images/app.clip /etc

Owners are numbers, times are UTC. Nothing but the index is fetched.")]
pub(super) struct LsArgs {
    #[command(flatten)]
    open: OpenArgs,
    /// The path inside the archive
    #[arg(default_value = "/")]
    path: String,
    /// All directories below, too
    #[arg(short = 'R', long)]
    recursive: bool,
}

impl LsArgs {
    pub(super) async fn run(self) -> Result<(), CliError> {
        let archive = self.open.open().await?;
        let (tree, root) = (archive.opened.fs.tree(), archive.opened.fs.root());
        let node = resolve(tree, root, &self.path, true)?;
        let mut out = BufWriter::new(io::stdout().lock());
        let terminal = io::stdout().is_terminal();
        list(tree, node, &self.path, self.recursive, terminal, &mut out)
            .and_then(|()| out.flush())
            .map_err(|e| CliError::output(&e))
    }
}

/// A path inside the archive, as a chroot at the shown root resolves it.
pub(super) fn resolve(tree: &Tree, root: NodeId, path: &str, follow: bool) -> Result<NodeId, CliError> {
    tree.resolve(root, path.as_bytes(), follow)
        .map_err(|e| CliError::NotFound(format!("{path}: {e}; `clip-csi ls ARCHIVE` shows what is there")))
}

fn list(
    tree: &Tree,
    node: NodeId,
    path: &str,
    recursive: bool,
    terminal: bool,
    out: &mut impl Write,
) -> io::Result<()> {
    if tree.attr(node).kind != Kind::Dir {
        return rows(tree, &[node], Some(path.as_bytes()), terminal, out);
    }
    let mut open = vec![(node, path.as_bytes().to_vec())];
    let mut first = true;
    while let Some((dir, path)) = open.pop() {
        if recursive {
            if !first {
                writeln!(out)?;
            }
            name(&path, terminal, out)?;
            writeln!(out, ":")?;
        }
        first = false;
        let children: Vec<NodeId> = tree.children(dir).map(NodeId).collect();
        rows(tree, &children, None, terminal, out)?;
        if recursive {
            for child in children.into_iter().rev().filter(|c| tree.attr(*c).kind == Kind::Dir) {
                let mut below = path.clone();
                if below.last() != Some(&b'/') {
                    below.push(b'/');
                }
                below.extend_from_slice(tree.name(child));
                open.push((child, below));
            }
        }
    }
    Ok(())
}

/// A name as it is for a pipe, escaped for a terminal.
fn name(bytes: &[u8], terminal: bool, out: &mut impl Write) -> io::Result<()> {
    if terminal { out.write_all(human::escaped(bytes).as_bytes()) } else { out.write_all(bytes) }
}

fn rows(tree: &Tree, nodes: &[NodeId], shown: Option<&[u8]>, terminal: bool, out: &mut impl Write) -> io::Result<()> {
    let cells: Vec<[String; 5]> = nodes
        .iter()
        .map(|node| {
            let attr = tree.attr(*node);
            let size = match attr.kind {
                Kind::CharDevice | Kind::BlockDevice => {
                    let dev = u64::from(attr.rdev);
                    format!("{}, {}", rustix::fs::major(dev), rustix::fs::minor(dev))
                }
                _ => attr.size.to_string(),
            };
            [attr.nlink.to_string(), attr.uid.to_string(), attr.gid.to_string(), size, human::time(attr.mtime)]
        })
        .collect();
    let mut widths = [0; 5];
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    for (node, row) in nodes.iter().zip(&cells) {
        let attr = tree.attr(*node);
        write!(out, "{}", human::mode(attr.kind, attr.mode))?;
        for (cell, width) in row.iter().zip(widths) {
            write!(out, " {cell:>width$}")?;
        }
        out.write_all(b" ")?;
        name(shown.unwrap_or_else(|| tree.name(*node)), terminal, out)?;
        if attr.kind == Kind::Symlink {
            out.write_all(b" -> ")?;
            name(tree.target(*node), terminal, out)?;
        }
        writeln!(out)?;
    }
    Ok(())
}
