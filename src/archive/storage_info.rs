//! Storage info: where the file data lies.
//!
//! On the wire it is a gob stream of a wrapper (a type, and bytes) whose bytes are a gob stream of their own.

use std::collections::BTreeMap;

use super::ArchiveError;
use super::gob::{Decoder, Define, Encoder, Fields, TypeId, Want, Writer};

/// Where the file data lies; decides v1 or v2.
#[derive(Debug, Clone, PartialEq)]
pub enum Storage {
    /// v1, local `.clip`: in the archive itself.
    Local,
    /// v1, remote `.rclip`: in an S3 object, itself a full `.clip`.
    S3(S3Storage),
    /// v2: in the layers of an image.
    Oci(Box<OciStorage>),
}

/// `S3StorageInfo` of the Go module. Untrusted: somebody wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct S3Storage {
    pub bucket: String,
    pub region: String,
    pub key: String,
    pub endpoint: String,
    pub force_path_style: bool,
}

/// `OCIStorageInfo` of the Go module. Untrusted: somebody wrote it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OciStorage {
    /// `index.docker.io` for Docker Hub; no scheme (a `http://` or `https://` prefix is read and kept).
    pub registry_url: String,
    /// `library/python`.
    pub repository: String,
    /// A tag, a digest, or `<tag>@sha256:<manifest digest>` (what we write).
    pub reference: String,
    /// Layer digests, lowest first: `sha256:…`.
    pub layers: Vec<String>,
    /// Checkpoints per layer digest: (compressed offset, uncompressed offset). No windows: of no use for seeking.
    pub gzip_checkpoints: BTreeMap<String, Vec<(i64, i64)>>,
    /// zstd frames per layer digest: (COff, CLen, UOff, ULen).
    pub zstd_frames: BTreeMap<String, Vec<(i64, i64, i64, i64)>>,
    /// Layer digest -> hex SHA-256 of the uncompressed tar. A claim, never a proof.
    pub decompressed_hash: BTreeMap<String, String>,
    /// The image's configuration as the reference keeps it.
    pub image: Option<ImageMetadata>,
}

/// `ImageMetadata` of the Go module.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs)]
pub struct ImageMetadata {
    pub name: String,
    pub digest: String,
    pub repo_tags: Vec<String>,
    /// Seconds since the epoch and nanoseconds; `None`: Go's zero time.
    pub created: Option<(i64, u32)>,
    pub docker_version: String,
    pub labels: BTreeMap<String, String>,
    pub architecture: String,
    pub os: String,
    pub variant: String,
    pub author: String,
    pub env: Vec<String>,
    pub cmd: Vec<String>,
    pub entrypoint: Vec<String>,
    pub user: String,
    pub working_dir: String,
    pub exposed_ports: Vec<String>,
    pub volumes: Vec<String>,
    pub stop_signal: String,
    pub layers: Vec<String>,
    pub layers_data: Vec<LayerMetadata>,
}

/// `LayerMetadata` of the Go module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct LayerMetadata {
    pub mime_type: String,
    pub digest: String,
    pub size: i64,
    pub annotations: BTreeMap<String, String>,
}

const WHAT: &str = "storage info";
const STRING: Want = Want::Basic(TypeId::STRING);
const INT: Want = Want::Basic(TypeId::INT);
/// Most layers that an image may have: a blob's index has 16 bits. (Docker stops at 127.)
pub const MAX_LAYERS: usize = 1 << 16;
/// From 0001-01-01, where Go's clock starts, to 1970-01-01, in seconds.
const GO_EPOCH: i64 = 62_135_596_800;

impl Storage {
    /// The header's type field: "", "s3" or "oci".
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Local => "",
            Self::S3(_) => "s3",
            Self::Oci(_) => "oci",
        }
    }

    /// Reads storage info; none at all is [`Storage::Local`]. The wrapper's own type decides.
    pub fn decode(bytes: &[u8]) -> Result<Self, ArchiveError> {
        if bytes.is_empty() {
            return Ok(Self::Local);
        }
        let mut d = Decoder::new(WHAT, bytes);
        let id = d.value()?;
        let plan =
            d.plan(id, "StorageInfoWrapper", &[("Type", STRING, 't'), ("Data", Want::Basic(TypeId::BYTES), 'd')])?;
        let (mut kind, mut data, mut at): (&[u8], &[u8], _) = (&[], &[], 0);
        while let Some((field, _)) = d.field(&plan, &mut at)? {
            match field {
                't' => kind = d.bytes()?,
                _ => data = d.bytes()?,
            }
        }
        match kind {
            b"s3" => decode_s3(data).map(Self::S3),
            b"oci" => decode_oci(data).map(|oci| Self::Oci(Box::new(oci))),
            other => {
                let detail = format!("storage type {}, \"s3\" and \"oci\" are known", super::builder::show(other));
                Err(ArchiveError::Unsupported { detail })
            }
        }
    }

    /// Writes it: the same bytes for the same value; none for [`Storage::Local`].
    pub fn encode(&self) -> Vec<u8> {
        let data = match self {
            Self::Local => return Vec::new(),
            Self::S3(s3) => encode_s3(s3),
            Self::Oci(oci) => encode_oci(oci),
        };
        let mut encoder = Encoder::default();
        let id = TypeId(65);
        encoder.define(id, "StorageInfoWrapper", Define::Struct(&[("Type", TypeId::STRING), ("Data", TypeId::BYTES)]));
        encoder.structure(id, |fields| {
            fields.bytes(0, self.type_name().as_bytes());
            fields.bytes(1, &data);
        });
        encoder.finish()
    }
}

fn decode_s3(bytes: &[u8]) -> Result<S3Storage, ArchiveError> {
    let mut d = Decoder::new(WHAT, bytes);
    let id = d.value()?;
    let plan = d.plan(
        id,
        "S3StorageInfo",
        &[
            ("Bucket", STRING, 'b'),
            ("Region", STRING, 'r'),
            ("Key", STRING, 'k'),
            ("Endpoint", STRING, 'e'),
            ("ForcePathStyle", Want::Basic(TypeId::BOOL), 'p'),
        ],
    )?;
    let (mut out, mut at) = (S3Storage::default(), 0);
    while let Some((field, _)) = d.field(&plan, &mut at)? {
        match field {
            'b' => out.bucket = d.string()?,
            'r' => out.region = d.string()?,
            'k' => out.key = d.string()?,
            'e' => out.endpoint = d.string()?,
            _ => out.force_path_style = d.bool()?,
        }
    }
    Ok(out)
}

fn encode_s3(s3: &S3Storage) -> Vec<u8> {
    let mut encoder = Encoder::default();
    let (id, string) = (TypeId(65), TypeId::STRING);
    let fields = [
        ("Bucket", string),
        ("Region", string),
        ("Key", string),
        ("Endpoint", string),
        ("ForcePathStyle", TypeId::BOOL),
    ];
    encoder.define(id, "S3StorageInfo", Define::Struct(&fields));
    encoder.structure(id, |fields| {
        for (number, value) in [&s3.bucket, &s3.region, &s3.key, &s3.endpoint].into_iter().enumerate() {
            fields.bytes(number as i64, value.as_bytes());
        }
        fields.uint(4, s3.force_path_style.into());
    });
    encoder.finish()
}

#[derive(Clone, Copy)]
enum Oci {
    Registry,
    Repository,
    Reference,
    Layers,
    Gzip,
    Zstd,
    Hashes,
    Image,
}

fn decode_oci(bytes: &[u8]) -> Result<OciStorage, ArchiveError> {
    let mut d = Decoder::new(WHAT, bytes);
    let id = d.value()?;
    let plan = d.plan(
        id,
        "OCIStorageInfo",
        &[
            ("RegistryURL", STRING, Oci::Registry),
            ("Repository", STRING, Oci::Repository),
            ("Reference", STRING, Oci::Reference),
            ("Layers", Want::List, Oci::Layers),
            ("GzipIdxByLayer", Want::Map, Oci::Gzip),
            ("ZstdIdxByLayer", Want::Map, Oci::Zstd),
            ("DecompressedHashByLayer", Want::Map, Oci::Hashes),
            ("ImageMetadata", Want::Struct, Oci::Image),
        ],
    )?;
    let (mut out, mut at) = (OciStorage::default(), 0);
    while let Some((field, id)) = d.field(&plan, &mut at)? {
        match field {
            Oci::Registry => out.registry_url = d.string()?,
            Oci::Repository => out.repository = d.string()?,
            Oci::Reference => out.reference = d.string()?,
            Oci::Layers => out.layers = strings(&mut d, id, "Layers")?,
            Oci::Gzip => {
                let rows = offsets_by_layer(&mut d, id, "Checkpoints", &["COff", "UOff"])?;
                out.gzip_checkpoints = rows
                    .into_iter()
                    .map(|(layer, rows)| (layer, rows.into_iter().map(|[coff, uoff, ..]| (coff, uoff)).collect()))
                    .collect();
            }
            Oci::Zstd => {
                let rows = offsets_by_layer(&mut d, id, "Frames", &["COff", "CLen", "UOff", "ULen"])?;
                out.zstd_frames = rows
                    .into_iter()
                    .map(|(layer, rows)| (layer, rows.into_iter().map(|[a, b, c, d]| (a, b, c, d)).collect()))
                    .collect();
            }
            Oci::Hashes => out.decompressed_hash = string_map(&mut d, id, "DecompressedHashByLayer")?,
            Oci::Image => out.image = Some(decode_image(&mut d, id)?),
        }
    }
    if out.layers.len() > MAX_LAYERS {
        let (value, limit) = (out.layers.len() as u64, MAX_LAYERS as u64);
        return Err(ArchiveError::TooLarge { what: "number of layers", value, limit });
    }
    Ok(out)
}

fn strings(d: &mut Decoder<'_>, list: TypeId, name: &str) -> Result<Vec<String>, ArchiveError> {
    d.expect(d.element(list)?, STRING, name)?;
    (0..d.count()?).map(|_| d.string()).collect()
}

fn string_map(d: &mut Decoder<'_>, map: TypeId, name: &str) -> Result<BTreeMap<String, String>, ArchiveError> {
    let (key, element) = d.key_and_element(map)?;
    d.expect(key, STRING, name)?;
    d.expect(element, STRING, name)?;
    (0..d.count()?).map(|_| Ok((d.string()?, d.string()?))).collect()
}

/// The keys of a `map[string]struct{}`, sorted.
fn string_set(d: &mut Decoder<'_>, map: TypeId, name: &str) -> Result<Vec<String>, ArchiveError> {
    let (key, element) = d.key_and_element(map)?;
    d.expect(key, STRING, name)?;
    let mut out = Vec::new();
    for _ in 0..d.count()? {
        out.push(d.string()?);
        d.skip(element)?;
    }
    out.sort_unstable();
    Ok(out)
}

type Rows = BTreeMap<String, Vec<[i64; 4]>>;

/// `map[string]*{LayerDigest, <list> []{<columns>}}`: what gzip and zstd indexes have in common.
fn offsets_by_layer(d: &mut Decoder<'_>, map: TypeId, list: &str, columns: &[&str]) -> Result<Rows, ArchiveError> {
    let (key, element) = d.key_and_element(map)?;
    d.expect(key, STRING, list)?;
    let layer_plan = d.plan(element, "a layer's index", &[(list, Want::List, ())])?;
    // An index type without its list has no offsets: nothing to plan for.
    let row_type = layer_plan.type_of(|()| true).map(|id| d.element(id)).transpose()?;
    let wanted: Vec<_> = columns.iter().enumerate().map(|(column, &name)| (name, INT, column)).collect();
    let row_plan = row_type.map(|id| d.plan(id, list, &wanted)).transpose()?;
    let mut out = Rows::new();
    for _ in 0..d.count()? {
        let layer = d.string()?;
        let (mut rows, mut at) = (Vec::new(), 0);
        while d.field(&layer_plan, &mut at)?.is_some() {
            let Some(row_plan) = &row_plan else { break };
            for _ in 0..d.count()? {
                let (mut row, mut at) = ([0; 4], 0);
                while let Some((column, _)) = d.field(row_plan, &mut at)? {
                    row[column & 3] = d.int()?;
                }
                rows.push(row);
            }
        }
        out.insert(layer, rows);
    }
    Ok(out)
}

#[derive(Clone, Copy)]
enum Image {
    Name,
    Digest,
    RepoTags,
    Created,
    DockerVersion,
    Labels,
    Architecture,
    Os,
    Variant,
    Author,
    Env,
    Cmd,
    Entrypoint,
    User,
    WorkingDir,
    ExposedPorts,
    Volumes,
    StopSignal,
    Layers,
    LayersData,
}

fn decode_image(d: &mut Decoder<'_>, id: TypeId) -> Result<ImageMetadata, ArchiveError> {
    let plan = d.plan(
        id,
        "ImageMetadata",
        &[
            ("Name", STRING, Image::Name),
            ("Digest", STRING, Image::Digest),
            ("RepoTags", Want::List, Image::RepoTags),
            ("Created", Want::Opaque, Image::Created),
            ("DockerVersion", STRING, Image::DockerVersion),
            ("Labels", Want::Map, Image::Labels),
            ("Architecture", STRING, Image::Architecture),
            ("Os", STRING, Image::Os),
            ("Variant", STRING, Image::Variant),
            ("Author", STRING, Image::Author),
            ("Env", Want::List, Image::Env),
            ("Cmd", Want::List, Image::Cmd),
            ("Entrypoint", Want::List, Image::Entrypoint),
            ("User", STRING, Image::User),
            ("WorkingDir", STRING, Image::WorkingDir),
            ("ExposedPorts", Want::Map, Image::ExposedPorts),
            ("Volumes", Want::Map, Image::Volumes),
            ("StopSignal", STRING, Image::StopSignal),
            ("Layers", Want::List, Image::Layers),
            ("LayersData", Want::List, Image::LayersData),
        ],
    )?;
    let (mut out, mut at) = (ImageMetadata::default(), 0);
    while let Some((field, id)) = d.field(&plan, &mut at)? {
        match field {
            Image::Name => out.name = d.string()?,
            Image::Digest => out.digest = d.string()?,
            Image::RepoTags => out.repo_tags = strings(d, id, "RepoTags")?,
            Image::Created => out.created = decode_time(d)?,
            Image::DockerVersion => out.docker_version = d.string()?,
            Image::Labels => out.labels = string_map(d, id, "Labels")?,
            Image::Architecture => out.architecture = d.string()?,
            Image::Os => out.os = d.string()?,
            Image::Variant => out.variant = d.string()?,
            Image::Author => out.author = d.string()?,
            Image::Env => out.env = strings(d, id, "Env")?,
            Image::Cmd => out.cmd = strings(d, id, "Cmd")?,
            Image::Entrypoint => out.entrypoint = strings(d, id, "Entrypoint")?,
            Image::User => out.user = d.string()?,
            Image::WorkingDir => out.working_dir = d.string()?,
            Image::ExposedPorts => out.exposed_ports = string_set(d, id, "ExposedPorts")?,
            Image::Volumes => out.volumes = string_set(d, id, "Volumes")?,
            Image::StopSignal => out.stop_signal = d.string()?,
            Image::Layers => out.layers = strings(d, id, "Layers")?,
            Image::LayersData => out.layers_data = decode_layers_data(d, id)?,
        }
    }
    Ok(out)
}

fn decode_layers_data(d: &mut Decoder<'_>, list: TypeId) -> Result<Vec<LayerMetadata>, ArchiveError> {
    let fields =
        [("MIMEType", STRING, 'm'), ("Digest", STRING, 'd'), ("Size", INT, 's'), ("Annotations", Want::Map, 'a')];
    let plan = d.plan(d.element(list)?, "LayerMetadata", &fields)?;
    let count = d.count()?;
    // All at once: grown by doubling, elements of a single byte would hold twice as much memory.
    let mut out = Vec::with_capacity(count);
    for _ in 0..count {
        let (mut layer, mut at) = (LayerMetadata::default(), 0);
        while let Some((field, id)) = d.field(&plan, &mut at)? {
            match field {
                'm' => layer.mime_type = d.string()?,
                'd' => layer.digest = d.string()?,
                's' => layer.size = d.int()?,
                _ => layer.annotations = string_map(d, id, "Annotations")?,
            }
        }
        out.push(layer);
    }
    Ok(out)
}

/// What `time.Time` makes of itself: a version (1; 2 where the zone has seconds), seconds since Go's epoch, nanoseconds, and
/// the zone, which does not change the instant.
fn decode_time(d: &mut Decoder<'_>) -> Result<Option<(i64, u32)>, ArchiveError> {
    let bytes = d.bytes()?;
    let parsed = match bytes {
        [version @ (1 | 2), rest @ ..] if rest.len() == 13 + usize::from(*version) => {
            let mut sec = [0; 8];
            let mut nsec = [0; 4];
            sec.copy_from_slice(&rest[..8]);
            nsec.copy_from_slice(&rest[8..12]);
            Some((i64::from_be_bytes(sec), u32::from_be_bytes(nsec)))
        }
        _ => None,
    };
    match parsed {
        Some((0, 0)) => Ok(None),
        Some((sec, nsec)) if nsec < 1_000_000_000 => match sec.checked_sub(GO_EPOCH) {
            Some(sec) => Ok(Some((sec, nsec))),
            None => Err(d.corrupt("ImageMetadata.Created is out of range")),
        },
        _ => Err(d.corrupt("ImageMetadata.Created is no time")),
    }
}

fn encode_time((sec, nsec): (i64, u32)) -> [u8; 15] {
    let mut out = [0; 15];
    out[0] = 1;
    out[1..9].copy_from_slice(&sec.wrapping_add(GO_EPOCH).to_be_bytes());
    out[9..13].copy_from_slice(&nsec.to_be_bytes());
    // The zone in minutes; -1 says UTC.
    out[13..].copy_from_slice(&(-1i16).to_be_bytes());
    out
}

fn write_strings(fields: &mut Fields<'_>, number: i64, strings: &[String]) {
    fields.list(number, strings.iter(), |writer, string| writer.bytes(string.as_bytes()));
}

fn write_map(fields: &mut Fields<'_>, number: i64, map: &BTreeMap<String, String>) {
    fields.list(number, map.iter(), |writer, (key, value)| {
        writer.bytes(key.as_bytes());
        writer.bytes(value.as_bytes());
    });
}

fn write_set(fields: &mut Fields<'_>, number: i64, keys: &[String]) {
    fields.list(number, keys.iter(), |writer, key| {
        writer.bytes(key.as_bytes());
        writer.fields().end();
    });
}

/// One element of a map of layer indexes: the layer's digest, as key and as first field, and rows of integers.
fn write_rows<const N: usize>(writer: &mut Writer, layer: &str, rows: impl ExactSizeIterator<Item = [i64; N]>) {
    writer.bytes(layer.as_bytes());
    let mut fields = writer.fields();
    fields.bytes(0, layer.as_bytes());
    fields.list(1, rows, |writer, row| {
        let mut fields = writer.fields();
        for (column, value) in row.into_iter().enumerate() {
            fields.int(column as i64, value);
        }
        fields.end();
    });
    fields.end();
}

fn encode_oci(oci: &OciStorage) -> Vec<u8> {
    let mut encoder = Encoder::default();
    let mut next = 64;
    let mut new = || {
        next += 1;
        TypeId(next)
    };
    let (info, strings, gzip_map, zstd_map, map, image) = (new(), new(), new(), new(), new(), new());
    let (gzip, points, point, zstd, frames, frame) = (new(), new(), new(), new(), new(), new());
    let (time, set, nothing, layers, layer) = (new(), new(), new(), new(), new());
    let (string, int) = (TypeId::STRING, TypeId::INT);
    let info_fields = [
        ("RegistryURL", string),
        ("Repository", string),
        ("Reference", string),
        ("Layers", strings),
        ("GzipIdxByLayer", gzip_map),
        ("ZstdIdxByLayer", zstd_map),
        ("DecompressedHashByLayer", map),
        ("ImageMetadata", image),
    ];
    let image_fields = [
        ("Name", string),
        ("Digest", string),
        ("RepoTags", strings),
        ("Created", time),
        ("DockerVersion", string),
        ("Labels", map),
        ("Architecture", string),
        ("Os", string),
        ("Variant", string),
        ("Author", string),
        ("Env", strings),
        ("Cmd", strings),
        ("Entrypoint", strings),
        ("User", string),
        ("WorkingDir", string),
        ("ExposedPorts", set),
        ("Volumes", set),
        ("StopSignal", string),
        ("Layers", strings),
        ("LayersData", layers),
    ];
    let frame_fields = [("COff", int), ("CLen", int), ("UOff", int), ("ULen", int)];
    let layer_fields = [("MIMEType", string), ("Digest", string), ("Size", int), ("Annotations", map)];
    encoder.define(info, "OCIStorageInfo", Define::Struct(&info_fields));
    encoder.define(strings, "[]string", Define::Slice(string));
    encoder.define(gzip_map, "map[string]*common.GzipIndex", Define::Map(string, gzip));
    encoder.define(gzip, "GzipIndex", Define::Struct(&[("LayerDigest", string), ("Checkpoints", points)]));
    encoder.define(points, "[]common.GzipCheckpoint", Define::Slice(point));
    encoder.define(point, "GzipCheckpoint", Define::Struct(&[("COff", int), ("UOff", int)]));
    encoder.define(zstd_map, "map[string]*common.ZstdIndex", Define::Map(string, zstd));
    encoder.define(zstd, "ZstdIndex", Define::Struct(&[("LayerDigest", string), ("Frames", frames)]));
    encoder.define(frames, "[]common.ZstdFrame", Define::Slice(frame));
    encoder.define(frame, "ZstdFrame", Define::Struct(&frame_fields));
    encoder.define(map, "map[string]string", Define::Map(string, string));
    encoder.define(image, "ImageMetadata", Define::Struct(&image_fields));
    encoder.define(time, "Time", Define::GobEncoder);
    encoder.define(set, "map[string]struct {}", Define::Map(string, nothing));
    encoder.define(nothing, "", Define::Struct(&[]));
    encoder.define(layers, "[]common.LayerMetadata", Define::Slice(layer));
    encoder.define(layer, "LayerMetadata", Define::Struct(&layer_fields));
    encoder.structure(info, |fields| {
        fields.bytes(0, oci.registry_url.as_bytes());
        fields.bytes(1, oci.repository.as_bytes());
        fields.bytes(2, oci.reference.as_bytes());
        write_strings(fields, 3, &oci.layers);
        fields.list(4, oci.gzip_checkpoints.iter(), |writer, (layer, rows)| {
            write_rows(writer, layer, rows.iter().map(|&(coff, uoff)| [coff, uoff]));
        });
        fields.list(5, oci.zstd_frames.iter(), |writer, (layer, rows)| {
            write_rows(writer, layer, rows.iter().map(|&(coff, clen, uoff, ulen)| [coff, clen, uoff, ulen]));
        });
        write_map(fields, 6, &oci.decompressed_hash);
        if let Some(image) = &oci.image {
            let mut fields = fields.nested(7).fields();
            write_image(&mut fields, image);
            fields.end();
        }
    });
    encoder.finish()
}

fn write_image(fields: &mut Fields<'_>, image: &ImageMetadata) {
    fields.bytes(0, image.name.as_bytes());
    fields.bytes(1, image.digest.as_bytes());
    write_strings(fields, 2, &image.repo_tags);
    if let Some(created) = image.created {
        fields.bytes(3, &encode_time(created));
    }
    fields.bytes(4, image.docker_version.as_bytes());
    write_map(fields, 5, &image.labels);
    fields.bytes(6, image.architecture.as_bytes());
    fields.bytes(7, image.os.as_bytes());
    fields.bytes(8, image.variant.as_bytes());
    fields.bytes(9, image.author.as_bytes());
    write_strings(fields, 10, &image.env);
    write_strings(fields, 11, &image.cmd);
    write_strings(fields, 12, &image.entrypoint);
    fields.bytes(13, image.user.as_bytes());
    fields.bytes(14, image.working_dir.as_bytes());
    write_set(fields, 15, &image.exposed_ports);
    write_set(fields, 16, &image.volumes);
    fields.bytes(17, image.stop_signal.as_bytes());
    write_strings(fields, 18, &image.layers);
    fields.list(19, image.layers_data.iter(), |writer, layer| {
        let mut fields = writer.fields();
        fields.bytes(0, layer.mime_type.as_bytes());
        fields.bytes(1, layer.digest.as_bytes());
        fields.int(2, layer.size);
        write_map(&mut fields, 3, &layer.annotations);
        fields.end();
    });
}

#[cfg(test)]
mod tests;
