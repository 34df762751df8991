//! v2: an index of an image whose data stays in its layers.

use std::path::Path;
use std::time::Instant;

use super::image_config::{ImageConfig, bad_image};
use super::indexing::Share;
use super::layer::{self, Scan};
use super::merge::Merger;
use super::output::{Output, blocking};
use super::progress::Progress;
use super::{BuildError, BuildOptions, BuildReport, generator};
use crate::archive::{self, BlobIx, BlobTable, Extension, HEADER_LEN, OciStorage, SeekTable, Storage, TreeBuilder};
use crate::metrics::metrics;
use crate::source::{ImageRef, ResolvedImage};
use crate::units::Compression;

/// Where an archive says that its layers lie.
struct Place {
    registry: String,
    repository: String,
    tag: Option<String>,
    layout: Option<String>,
    warning: Option<String>,
}

/// Indexes an image. See [`super::index_image`].
pub(super) async fn index_image(
    image: &ResolvedImage,
    out: &Path,
    options: &BuildOptions,
    progress: &dyn Progress,
) -> Result<BuildReport, BuildError> {
    let started = Instant::now();
    let place = place(image, options)?;
    indexable(image)?;
    let config = ImageConfig::parse(image)?;
    let diff_ids = config.diff_ids(image)?;
    let tables = options.tables_of_contents;
    let share = Share::new(&options.indexing);
    let (scans, order) = layer::scan_all(image, &diff_ids, options.span_size, tables, &share, None, progress).await?;

    let reference = format!("{}@{}", place.tag.as_deref().unwrap_or("latest"), image.manifest_digest);
    let mut storage = OciStorage {
        registry_url: place.registry,
        repository: place.repository,
        reference,
        layers: image.layers.iter().map(|layer| layer.digest.to_string()).collect(),
        image: Some(config.metadata(image)),
        ..OciStorage::default()
    };
    for scan in &scans {
        describe(&mut storage, &scan.table, options.checkpoint_mib);
    }
    let extension = Extension {
        generator: generator(),
        manifest_digest: Some(image.manifest_digest),
        platform: Some(image.platform.clone()),
        layout: place.layout,
        ..Extension::default()
    };
    let digests: Vec<_> = image.layers.iter().map(|layer| layer.digest).collect();
    let layer_bytes = image.layers.iter().map(|layer| layer.size).sum();
    let out = out.to_owned();
    let report = blocking(move || {
        // Held until the names are written.
        let _share = share;
        let (tree, seek_table) = merge(scans, &order, &digests)?;
        let storage = Storage::Oci(Box::new(storage));
        let encoded = archive::encode(&tree, &storage, extension, &seek_table, HEADER_LEN as u64)?;
        let output = Output::create(&out)?;
        let write = |mut file: &std::fs::File| {
            use std::io::Write;
            file.write_all(&encoded.header)?;
            file.write_all(&encoded.tail)
        };
        write(output.file()).map_err(|error| output.error(error))?;
        Ok(BuildReport {
            archive_bytes: output.commit()?,
            nodes: tree.len() as u64,
            content_bytes: tree.total_size(),
            layer_bytes,
            warnings: place.warning.into_iter().collect(),
        })
    })
    .await?;
    metrics().index_build_seconds.observe(started.elapsed().as_secs_f64());
    metrics().index_bytes.inc_by(report.archive_bytes);
    Ok(report)
}

/// Merges the scans in the layers' order. A layer that comes twice is one blob: its files lie in the first.
fn merge(
    scans: Vec<Scan>,
    order: &[usize],
    digests: &[crate::units::Digest],
) -> Result<(archive::Tree, SeekTable), BuildError> {
    let mut merger = Merger::new();
    let mut scans: Vec<Option<Scan>> = scans.into_iter().map(Some).collect();
    let mut blobs: Vec<BlobTable> = Vec::with_capacity(order.len());
    for (i, (&number, digest)) in order.iter().zip(digests).enumerate() {
        let first = order.iter().position(|n| *n == number).unwrap_or(i);
        let used_again = order[i + 1..].contains(&number);
        let entries = match scans.get_mut(number) {
            Some(Some(scan)) if used_again => scan.entries.clone(),
            Some(Some(scan)) => std::mem::take(&mut scan.entries),
            _ => Vec::new(),
        };
        let bad = |error: super::merge::MergeError| BuildError::BadLayer { layer: *digest, detail: error.to_string() };
        // `indexable` has counted the layers.
        merger.apply(BlobIx(u16::try_from(first).unwrap_or(u16::MAX)), entries).map_err(bad)?;
        let table = match scans.get_mut(number) {
            Some(slot) if !used_again => slot.take().map(|scan| scan.table),
            Some(slot) => slot.as_ref().map(|scan| scan.table.clone()),
            None => None,
        };
        blobs.extend(table);
    }
    let mut builder = TreeBuilder::default();
    merger.finish("", &mut |path, entry| builder.insert(&path, entry));
    Ok((builder.finish()?, SeekTable { blobs }))
}

/// Can the layers be read lazily from where they lie?
fn indexable(image: &ResolvedImage) -> Result<(), BuildError> {
    if image.layers.len() > usize::from(u16::MAX) {
        return Err(bad_image(image, format!("it has {} layers", image.layers.len())));
    }
    for layer in &image.layers {
        let detail = match layer::media_type(&layer.media_type) {
            (Some(_), false) => continue,
            (Some(_), true) => {
                "may not be distributed, so no registry has to hold it: build the image on a base without such layers, \
                 or archive it (v1) where they can be had"
            }
            (None, _) => "is of a kind that can't be read (tar, alone or with gzip or zstd, can): push the image again",
        };
        let detail =
            format!("layer {} (media type {}) {detail}", layer.digest, super::tar::show(layer.media_type.as_bytes()));
        return Err(BuildError::V2Impossible { detail });
    }
    Ok(())
}

fn place(image: &ResolvedImage, options: &BuildOptions) -> Result<Place, BuildError> {
    if let Some(ImageRef::Registry { digest: Some(digest), .. }) = &options.store_as
        && *digest != image.manifest_digest
    {
        let found = image.manifest_digest;
        let detail =
            format!("its manifest is {found}, --store-as names {digest}; name the place by its tag, or by that digest");
        return Err(bad_image(image, detail));
    }
    match options.store_as.as_ref().unwrap_or(&image.reference) {
        ImageRef::Registry { registry, repository, tag, .. } => Ok(Place {
            registry: registry.clone(),
            repository: repository.clone(),
            tag: tag.clone(),
            layout: None,
            warning: None,
        }),
        ImageRef::Layout { dir, tag } => {
            let dir = std::path::absolute(dir).map_err(super::output::io_error(dir.display().to_string()))?;
            let Some(path) = dir.to_str() else {
                return Err(bad_image(image, "the layout's path is not UTF-8; name the registry with --store-as"));
            };
            Ok(Place {
                registry: String::new(),
                repository: String::new(),
                tag: tag.clone(),
                layout: Some(path.to_owned()),
                warning: Some(format!(
                    "the archive points to the layers in {path}: only this machine can mount it; name the image's \
                     place in a registry with --store-as to mount it elsewhere"
                )),
            })
        }
        ImageRef::LayoutArchive { file, .. } => Err(BuildError::V2Impossible {
            detail: format!(
                "the layers lie inside {}, where no mount can read them; unpack it and use oci:DIR, or name the \
                 image's place in a registry with --store-as",
                file.display()
            ),
        }),
    }
}

/// What the Go module keeps of a layer: bare offsets, at least `checkpoint_mib` apart, the end of the layer as the last.
fn describe(storage: &mut OciStorage, table: &BlobTable, checkpoint_mib: u64) {
    let layer = table.digest.to_string();
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    storage.decompressed_hash.insert(layer.clone(), table.diff_id.hex());
    // Offsets in chunks are none in the tar, which is what the Go module counts in.
    if table.chunks.is_some() {
        return;
    }
    // Spans that share a restart point begin at one place of the compressed layer.
    let restarts: Vec<_> = table.spans.chunk_by(|a, b| a.coff == b.coff && a.bits == b.bits).collect();
    match table.compression {
        Compression::Gzip => {
            let distance = checkpoint_mib.clamp(1, 1 << 20) << 20;
            let mut last = 0;
            let mut checkpoints = Vec::new();
            for span in restarts.iter().filter_map(|spans| spans.first()) {
                if span.uoff - last >= distance {
                    checkpoints.push((signed(span.coff), signed(span.uoff)));
                    last = span.uoff;
                }
            }
            if table.ulen > last {
                checkpoints.push((signed(table.clen), signed(table.ulen)));
            }
            storage.gzip_checkpoints.insert(layer, checkpoints);
        }
        Compression::Zstd => {
            let ends = restarts.iter().skip(1).filter_map(|spans| spans.first()).map(|span| span.uoff);
            let frames = restarts.iter().zip(ends.chain([table.ulen])).filter_map(|(spans, end)| {
                let first = spans.first()?;
                let cend = spans.iter().map(|span| span.cend).max()?;
                Some((signed(first.coff), signed(cend - first.coff), signed(first.uoff), signed(end - first.uoff)))
            });
            storage.zstd_frames.insert(layer, frames.collect());
        }
        Compression::None => {}
    }
}
