//! What the demo prints.

use std::time::Duration;

use super::image::DemoImage;
use super::plugin::Plugin;
use super::{Archive, Seen};
use crate::cli::{CliError, human};

/// The first line, and what is skipped where `blocked` says why.
pub(super) fn opening(blocked: Option<&str>) {
    match blocked {
        None => println!("clip-csi demo: an image, archived as v1, indexed as v2, published as the kubelet does it\n"),
        Some(why) => println!(
            "clip-csi demo without mounts, {why}: the same reads go through the library\n\n\
             skipped    node plugin, GetPluginInfo, Probe, NodeGetInfo, NodePublishVolume, NodeGetVolumeStats, \
             NodeUnpublishVolume\n"
        ),
    }
}

pub(super) fn image(image: &DemoImage) {
    println!(
        "image      {} layers, {} names, {} files, {}; the layers take {}",
        image.layers,
        human::count(image.model.names.len() as u64),
        human::count(image.model.files()),
        human::bytes(image.model.content_bytes()),
        human::bytes(image.layer_bytes),
    );
    println!("           from this machine's /usr; a hard link, a symlink, setuid, another owner, and");
    for change in &image.changes {
        println!("           - {change}");
    }
}

/// GetPluginInfo, Probe, NodeGetInfo.
pub(super) async fn plugin(plugin: &mut Plugin) -> Result<(), CliError> {
    let failed = |e: crate::csi::client::ClientError| CliError::Failed(e.to_string());
    let (name, version) = plugin.client.plugin_info().await.map_err(failed)?;
    if !plugin.client.probe().await.map_err(failed)? {
        return Err(CliError::Failed("Probe says that the plugin is not ready".into()));
    }
    let node = plugin.client.node_id().await.map_err(failed)?;
    println!("plugin     {name} {version}, ready, on node {node}");
    Ok(())
}

/// Both archives side by side; gives whether both trees equal the image's.
pub(super) fn table(image: &DemoImage, archives: &[Archive], seen: &[Seen]) -> bool {
    let expected = image.model.digest();
    let content = image.model.content_bytes();
    let pairs: Vec<(&Archive, &Seen)> = archives.iter().zip(seen).collect();
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let mut row = |what: &str, cell: &dyn Fn(&(&Archive, &Seen)) -> String| {
        rows.push((what.to_owned(), pairs.iter().map(cell).collect()));
    };
    let of =
        |bytes: u64| format!("{} ({} of the layers)", human::bytes(bytes), human::percent(bytes, image.layer_bytes));
    for (archive, seen) in &pairs {
        println!("{:<11}detected from {}", archive.name, seen.detected_from);
    }
    println!();
    row("", &|(archive, _)| archive.name.to_owned());
    row("archive", &|(archive, _)| of(archive.bytes));
    row("made in", &|(archive, _)| human::duration(archive.built));
    let published = if seen.iter().any(|s| s.stats.is_some()) { "published in" } else { "opened in" };
    row(published, &|(_, seen)| human::duration(seen.publish));
    row("first byte after", &|(_, seen)| human::duration(seen.first_byte));
    let probe = format!("fetched for {}", probe_size(image));
    row(&probe, &|(_, seen)| human::bytes(seen.fetched_probe));
    row("fetched for everything", &|(_, seen)| {
        format!("{} of {}", human::bytes(seen.fetched_all), human::bytes(content))
    });
    row("everything read in", &|(_, seen)| human::duration(seen.read_all));
    row("volume stats", &|(_, seen)| seen.stats.clone().unwrap_or_else(|| "skipped".into()));
    row("digest of the tree", &|(_, seen)| human::short_digest(&seen.tree.to_string()));
    row("", &|(_, seen)| if seen.tree == expected { "= the image's".into() } else { "IS NOT the image's".into() });
    print(&rows);
    for (archive, seen) in &pairs {
        for difference in &seen.differences {
            println!("{}: {difference}", archive.name);
        }
    }
    seen.iter().all(|seen| seen.tree == expected)
}

/// Columns as wide as their widest cell.
fn print(rows: &[(String, Vec<String>)]) {
    let widest = |column: usize| {
        let cells =
            rows.iter().filter_map(|(what, cells)| if column == 0 { Some(what) } else { cells.get(column - 1) });
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0) + 3
    };
    for (what, cells) in rows {
        let all = std::iter::once(what).chain(cells).enumerate();
        let line: String = all.map(|(column, cell)| format!("{cell:<width$}", width = widest(column))).collect();
        println!("{}", line.trim_end());
    }
}

fn probe_size(image: &DemoImage) -> String {
    let size = image.model.single_files().find(|(name, _)| **name == image.probe).map_or(0, |(_, size)| size);
    format!("a {} file", human::bytes(size))
}

pub(super) fn closing(good: bool, took: Duration) {
    let verdict = if good { "every byte, name, mode, owner and time as in the image" } else { "FAILED" };
    println!("\n{verdict}; nothing left mounted, running or on disk; {}", human::duration(took));
}
