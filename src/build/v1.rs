//! v1: an archive that carries its data. An image's in the bundle shape, and the index-only twin for an archive in S3.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use super::bundle;
use super::data_region::{DataRegion, Written};
use super::image_config::{ImageConfig, bad_image};
use super::indexing::Share;
use super::layer::{self, Bar, Scan};
use super::merge::{MergeError, Merger};
use super::output::{Output, blocking, blocking_with_bar, directory, io_error};
use super::progress::Progress;
use super::{BuildError, BuildOptions, BuildReport, generator};
use crate::archive::{
    self, BlobIx, BlobTable, Entry, Extension, HEADER_LEN, Header, Kind, S3Storage, SeekTable, Storage, Timestamp,
    Tree, TreeBuilder,
};
use crate::metrics::metrics;
use crate::source::ResolvedImage;
use crate::units::Digest;

/// What the image's root is called in a bundle.
const ROOTFS: &str = "/rootfs";
/// The runtime spec beside it.
const CONFIG: &[u8] = b"/config.json";
/// Largest passwd or group file that a user is looked up in.
const MAX_PASSWD: u64 = 1 << 20;
/// Bytes copied at a time.
const COPY: usize = 1 << 20;
/// Index and storage info of an archive that a remote index is made of.
const MAX_METADATA: u64 = 1 << 30;
/// How often the header's digest may change the header before we give up; see [`seal`].
const SEAL_TRIES: usize = 16;

/// One name of an archive under construction.
#[derive(Debug)]
pub(super) struct Name {
    /// Absolute.
    pub path: Vec<u8>,
    /// Until its data is written, blob, offset and extents say where to copy from, whatever that means to the copier.
    pub entry: Entry,
}

/// Archives an image. See [`super::archive_image`].
pub(super) async fn archive_image(
    image: &ResolvedImage,
    out: &Path,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, BuildError> {
    let started = Instant::now();
    for layer in &image.layers {
        if layer::media_type(&layer.media_type).0.is_none() {
            let kind = super::tar::show(layer.media_type.as_bytes());
            let detail = format!(
                "layer {} is of a kind that can't be read (media type {kind}); push the image again with tar layers",
                layer.digest
            );
            return Err(bad_image(image, detail));
        }
    }
    if image.layers.len() > usize::from(u16::MAX) {
        return Err(bad_image(image, format!("it has {} layers", image.layers.len())));
    }
    let config = ImageConfig::parse(image)?;
    let diff_ids = config.diff_ids(image)?;
    // Layers are downloaded and inflated once: the whole of each waits in a nameless file until it is known which files are left.
    let beside = directory(out).to_owned();
    let spool =
        || tempfile::tempfile_in(&beside).map_err(io_error(format!("create a temporary file in {}", beside.display())));
    let share = Share::new(&options.indexing);
    let (scans, order) = layer::scan_all(image, &diff_ids, 64 << 20, false, &share, Some(&spool), progress).await?;
    metrics().v1_extract_seconds.observe(started.elapsed().as_secs_f64());

    let digests: Vec<Digest> = image.layers.iter().map(|layer| layer.digest).collect();
    let (names, spools) = blocking(move || merge(scans, &order, &digests)).await?;
    let bar = Bar::begin(progress, "write the archive", content_size(&names));
    let extension = Extension {
        generator: generator(),
        bundle: true,
        manifest_digest: Some(image.manifest_digest),
        platform: Some(image.platform.clone()),
        ..Extension::default()
    };
    let layer_bytes = image.layers.iter().map(|layer| layer.size).sum();
    let (out, span_size) = (out.to_owned(), options.span_size);
    let report = blocking_with_bar(&bar, move |work| {
        let mut names = names;
        let mut warnings = Vec::new();
        let spec = add_bundle(&mut names, &spools, &config, &mut warnings)?;
        let output = Output::create(&out)?;
        let mut region = DataRegion::begin(&output, span_size);
        let mut buffer = vec![0; COPY];
        write_files(&mut names, &mut region, &mut |name, region| {
            if name.path == CONFIG {
                return region.data(&spec);
            }
            copy_spooled(&spools, name, region, &mut buffer)?;
            work.advance(name.entry.size)
        })?;
        let (tail_pos, table) = region.finish()?;
        let tree = tree_of(names)?;
        let archive_bytes = seal(output, &tree, extension, table, tail_pos)?;
        let (nodes, content_bytes) = (tree.len() as u64, tree.total_size());
        Ok(BuildReport { archive_bytes, nodes, content_bytes, layer_bytes, warnings })
    })
    .await?;
    metrics().v1_archive_bytes.inc_by(report.archive_bytes);
    Ok(report)
}

/// Merges the scans in the layers' order; blobs are the numbers of the spools.
fn merge(
    mut scans: Vec<Scan>,
    order: &[usize],
    digests: &[Digest],
) -> Result<(Vec<Name>, Vec<Option<File>>), BuildError> {
    let mut merger = Merger::new();
    for (i, (&number, digest)) in order.iter().zip(digests).enumerate() {
        let used_again = order[i + 1..].contains(&number);
        let entries = match scans.get_mut(number) {
            Some(scan) if used_again => scan.entries.clone(),
            Some(scan) => std::mem::take(&mut scan.entries),
            None => Vec::new(),
        };
        let bad = |error: MergeError| BuildError::BadLayer { layer: *digest, detail: error.to_string() };
        // The caller has counted the layers.
        merger.apply(BlobIx(u16::try_from(number).unwrap_or(u16::MAX)), entries).map_err(bad)?;
    }
    let mut names = Vec::new();
    merger.finish(ROOTFS, &mut |path, entry| names.push(Name { path, entry }));
    Ok((names, scans.into_iter().map(|scan| scan.spool).collect()))
}

/// Adds the bundle's root and its runtime spec, whose bytes are the answer.
fn add_bundle(
    names: &mut Vec<Name>,
    spools: &[Option<File>],
    config: &ImageConfig,
    warnings: &mut Vec<String>,
) -> Result<Vec<u8>, BuildError> {
    let read = |path: &[u8]| match names.iter().find(|name| name.path == path) {
        Some(name) if name.entry.kind == Kind::File && name.entry.size <= MAX_PASSWD => read_spooled(spools, name),
        _ => Ok(Vec::new()),
    };
    let wanted = config.config.as_ref().and_then(|run| run.user.as_deref()).unwrap_or_default();
    let user = match bundle::user(wanted, &read(b"/rootfs/etc/passwd")?, &read(b"/rootfs/etc/group")?) {
        Some(user) => user,
        None => {
            let wanted = super::tar::show(wanted.as_bytes());
            warnings.push(format!(
                "the image's user {wanted:?} is not in its /etc/passwd or /etc/group: config.json says 65534:65534"
            ));
            bundle::NOBODY
        }
    };
    let spec = bundle::runtime_spec(config, user);
    let created = config.created().map(|(sec, nsec)| Timestamp { sec, nsec }).unwrap_or_default();
    let plain =
        |kind, mode, size| Entry { size, atime: created, mtime: created, ctime: created, ..Entry::new(kind, mode) };
    names.push(Name { path: b"/".to_vec(), entry: plain(Kind::Dir, 0o755, 0) });
    names.push(Name { path: CONFIG.to_vec(), entry: plain(Kind::File, 0o644, spec.len() as u64) });
    Ok(spec)
}

fn spool_error(error: std::io::Error) -> BuildError {
    io_error("read a layer's temporary file")(error)
}

fn spool_of<'a>(spools: &'a [Option<File>], name: &Name) -> Result<&'a File, BuildError> {
    let spool = spools.get(usize::from(name.entry.blob.0)).and_then(Option::as_ref);
    spool.ok_or_else(|| spool_error(std::io::ErrorKind::NotFound.into()))
}

/// A small file without holes, whole.
fn read_spooled(spools: &[Option<File>], name: &Name) -> Result<Vec<u8>, BuildError> {
    let mut bytes = Vec::new();
    if name.entry.extents.is_none() {
        bytes.resize(usize::try_from(name.entry.size).unwrap_or(0), 0);
        spool_of(spools, name)?.read_exact_at(&mut bytes, name.entry.offset).map_err(spool_error)?;
    }
    Ok(bytes)
}

/// Copies a file of a layer into its block.
fn copy_spooled(
    spools: &[Option<File>],
    name: &Name,
    region: &mut DataRegion<'_>,
    buffer: &mut [u8],
) -> Result<(), BuildError> {
    let entry = &name.entry;
    let spool = spool_of(spools, name)?;
    let mut copy = |region: &mut DataRegion<'_>, mut at: u64, mut len: u64| {
        while len > 0 {
            let n = len.min(buffer.len() as u64) as usize;
            spool.read_exact_at(&mut buffer[..n], at).map_err(spool_error)?;
            region.data(&buffer[..n])?;
            (at, len) = (at + n as u64, len - n as u64);
        }
        Ok::<(), BuildError>(())
    };
    let Some(extents) = &entry.extents else {
        return copy(region, entry.offset, entry.size);
    };
    let mut end = 0;
    for extent in extents {
        region.hole(extent.offset - end)?;
        copy(region, extent.blob_offset, extent.len)?;
        end = extent.offset + extent.len;
    }
    region.hole(entry.size - end)
}

/// Is it among what a starting container reads first? The reference's own list, for any version of Python 3.
fn first(path: &[u8]) -> bool {
    let python = |rest: &[u8]| {
        let digits = rest.iter().position(|b| !b.is_ascii_digit() && *b != b'.').unwrap_or(rest.len());
        rest[digits..].starts_with(b"/dist-packages")
    };
    path.starts_with(b"/rootfs/usr/lib")
        || path.starts_with(b"/rootfs/usr/bin")
        || path.strip_prefix(b"/rootfs/usr/local/lib/python3").is_some_and(python)
}

/// Bytes of all regular files, each inode once.
pub(super) fn content_size(names: &[Name]) -> u64 {
    let mut groups = std::collections::HashSet::new();
    let counts = |name: &&Name| name.entry.link_group == 0 || groups.insert(name.entry.link_group);
    names.iter().filter(counts).map(|name| name.entry.size).fold(0, u64::saturating_add)
}

/// Writes the block of every regular file, those first that are read first, else in path order; `copy` gives a file's bytes, exactly
/// `entry.size` of them. Names of one file share a block. Then the entries say where their data lies and what its SHA-256 is.
pub(super) fn write_files(
    names: &mut [Name],
    region: &mut DataRegion<'_>,
    copy: &mut dyn FnMut(&Name, &mut DataRegion<'_>) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let mut order: Vec<usize> = (0..names.len()).filter(|i| names[*i].entry.kind == Kind::File).collect();
    order.sort_by_cached_key(|i| (Reverse(first(&names[*i].path)), names[*i].path.clone()));
    let mut shared: HashMap<u64, Written> = HashMap::new();
    for i in order {
        let group = names[i].entry.link_group;
        let written = match shared.get(&group) {
            Some(written) => written.clone(),
            None => {
                region.begin_file()?;
                copy(&names[i], region)?;
                let written = region.end_file()?;
                if group != 0 {
                    shared.insert(group, written.clone());
                }
                written
            }
        };
        let entry = &mut names[i].entry;
        (entry.blob, entry.offset, entry.extents) = (BlobIx(0), written.offset, written.extents);
        entry.content_hash = Some(written.digest);
    }
    Ok(())
}

/// The tree of the names.
pub(super) fn tree_of(names: Vec<Name>) -> Result<Tree, BuildError> {
    let mut builder = TreeBuilder::default();
    for name in names {
        builder.insert(&name.path, name.entry);
    }
    Ok(builder.finish()?)
}

/// Writes seek table, index and header around the data, and gives the archive its name; its length.
///
/// The header is part of the blob that the seek table describes, and its digest is in the index, whose position and length are in the
/// header. But the header holds positions and lengths only, and these hardly depend on one digest's bits: so
/// encoding is repeated until the header that comes out is the one whose digest went in, which takes two rounds as a rule.
pub(super) fn seal(
    output: Output,
    tree: &Tree,
    extension: Extension,
    table: BlobTable,
    tail_pos: u64,
) -> Result<u64, BuildError> {
    let mut seek_table = SeekTable { blobs: vec![table] };
    for _ in 0..SEAL_TRIES {
        let encoded = archive::encode(tree, &Storage::Local, extension.clone(), &seek_table, tail_pos)?;
        let digest = Digest::of(&encoded.header);
        let Some(header_span) = seek_table.blobs.first_mut().and_then(|blob| blob.spans.first_mut()) else { break };
        if header_span.digest != digest {
            header_span.digest = digest;
            continue;
        }
        let write = |file: &File| {
            file.write_all_at(&encoded.tail, tail_pos)?;
            file.write_all_at(&encoded.header, 0)
        };
        write(output.file()).map_err(|error| output.error(error))?;
        return output.commit();
    }
    let detail = format!("the digest of its header does not settle in {SEAL_TRIES} rounds");
    Err(crate::archive::ArchiveError::Corrupt { what: "header", detail }.into())
}

/// Writes the index-only twin (`.rclip`) of a full local v1 archive: the same tree, with the data in the S3 object that the full archive
/// is, or will be, stored as. All positions, the seek table's too, are those of the full archive.
pub async fn write_remote_index(full: &Path, storage: S3Storage, out: &Path) -> Result<BuildReport, BuildError> {
    let (full, out) = (full.to_owned(), out.to_owned());
    blocking(move || {
        let what = full.display().to_string();
        let file = File::open(&full).map_err(io_error(&what))?;
        let read = |at: u64, len: u64, part: &'static str| -> Result<Vec<u8>, BuildError> {
            if len > MAX_METADATA {
                return Err(archive::ArchiveError::TooLarge { what: part, value: len, limit: MAX_METADATA }.into());
            }
            let mut bytes = Vec::new();
            let mut from = &file;
            std::io::Seek::seek(&mut from, std::io::SeekFrom::Start(at)).map_err(io_error(&what))?;
            from.take(len).read_to_end(&mut bytes).map_err(io_error(&what))?;
            Ok(bytes)
        };
        let header_bytes = read(0, HEADER_LEN as u64, "header")?;
        let header = Header::decode(&header_bytes)?;
        let index = read(header.index.0, header.index.1, "index")?;
        let info = read(header.storage_info.0, header.storage_info.1, "storage info")?;
        let archive = archive::decode(&header_bytes, &index, &info)?;
        if archive.storage != Storage::Local {
            let detail = "only an archive that carries its data can be stored with a remote index".into();
            return Err(BuildError::Io { what, detail });
        }
        let extension = archive.extension.unwrap_or_default();
        let storage = Storage::S3(storage);
        let encoded = archive::encode(&archive.tree, &storage, extension, &SeekTable::default(), HEADER_LEN as u64)?;
        let output = Output::create(&out)?;
        let write = |file: &File| {
            file.write_all_at(&encoded.header, 0)?;
            file.write_all_at(&encoded.tail, HEADER_LEN as u64)
        };
        write(output.file()).map_err(|error| output.error(error))?;
        Ok(BuildReport {
            archive_bytes: output.commit()?,
            nodes: archive.tree.len() as u64,
            content_bytes: archive.tree.total_size(),
            ..BuildReport::default()
        })
    })
    .await
}
