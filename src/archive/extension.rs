//! What clip-csi adds to an archive, in places that the Go module skips.
//!
//! The root rides on the root node as a struct field `XClipExt`; the names that follow in the index may then carry
//! `XClipXattrs`, `XClipRdev`, `XClipSparse`, `XClipBlob` and `XClipExtents` (see [`super::encode`]). Fields are matched by name, so that newer
//! minor versions may add some; a newer *major* version is refused by name.

use super::ArchiveError;
use super::gob::{Decoder, Define, Encoder, Fields, Plan, TypeId, Want};
use crate::units::{Digest, Platform};

/// The major version of the extension: a reader refuses a newer one.
pub const MAJOR: u64 = 1;
/// The minor version: a reader ignores what a newer one adds.
pub const MINOR: u64 = 0;

/// The root of our extension: rides on the root node of the index as `XClip…` fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extension {
    /// `clip-csi 0.1.0`.
    pub generator: String,
    /// Position, length and SHA-256 of the seek table in the archive file (in the *full* `.clip` for a v1 archive in S3).
    pub seek_table: Option<(u64, u64, Digest)>,
    /// The archive holds an OCI bundle: the image's root is `/rootfs`, beside `/config.json`.
    pub bundle: bool,
    /// Digest of the image manifest that the archive was made of.
    pub manifest_digest: Option<Digest>,
    /// Platform of that manifest.
    pub platform: Option<Platform>,
    /// An absolute path of an OCI layout, where the layers lie in no registry (`index oci:DIR` without `--store-as`).
    pub layout: Option<String>,
}

/// The fields of `XClipExt`, in their order on the wire.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    Major,
    Minor,
    Generator,
    SeekPos,
    SeekLen,
    SeekDigest,
    Bundle,
    Manifest,
    Platform,
    Layout,
    Sum,
}

const FIELDS: [(&str, TypeId, Field); 11] = [
    ("Major", TypeId::UINT, Field::Major),
    ("Minor", TypeId::UINT, Field::Minor),
    ("Generator", TypeId::STRING, Field::Generator),
    ("SeekPos", TypeId::UINT, Field::SeekPos),
    ("SeekLen", TypeId::UINT, Field::SeekLen),
    ("SeekDigest", TypeId::STRING, Field::SeekDigest),
    ("Bundle", TypeId::BOOL, Field::Bundle),
    ("Manifest", TypeId::STRING, Field::Manifest),
    ("Platform", TypeId::STRING, Field::Platform),
    ("Layout", TypeId::STRING, Field::Layout),
    ("Sum", TypeId::STRING, Field::Sum),
];

pub(super) fn define(encoder: &mut Encoder, id: TypeId) {
    encoder.define(id, "XClipExt", Define::Struct(&FIELDS.map(|(name, id, _)| (name, id))));
}

impl Extension {
    pub(super) fn write(&self, fields: &mut Fields<'_>) {
        fields.uint(0, MAJOR);
        fields.uint(1, MINOR);
        fields.bytes(2, self.generator.as_bytes());
        if let Some((pos, len, digest)) = self.seek_table {
            fields.uint(3, pos);
            fields.uint(4, len);
            fields.bytes(5, digest.to_string().as_bytes());
        }
        fields.uint(6, self.bundle.into());
        for (number, text) in [
            (7, self.manifest_digest.map(|digest| digest.to_string())),
            (8, self.platform.as_ref().map(ToString::to_string)),
            (9, self.layout.clone()),
        ] {
            fields.bytes(number, text.unwrap_or_default().as_bytes());
        }
        fields.bytes(10, &super::sum::blank());
    }

    pub(super) fn plan(d: &Decoder<'_>, id: TypeId) -> Result<Plan<Field>, ArchiveError> {
        d.plan(id, "XClipExt", &FIELDS.map(|(name, id, field)| (name, Want::Basic(id), field)))
    }

    /// And whether it names a digest of the metadata ([`super::sum`]).
    pub(super) fn read(d: &mut Decoder<'_>, plan: &Plan<Field>) -> Result<(Self, bool), ArchiveError> {
        fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(d: &mut Decoder<'_>) -> Result<T, ArchiveError> {
            let text = d.string()?;
            text.parse().map_err(|error| d.corrupt(format!("XClipExt: {error}")))
        }
        let mut out = Self::default();
        let (mut major, mut pos, mut len, mut digest, mut summed) = (0, 0u64, 0, None, false);
        let mut at = 0;
        while let Some((field, _)) = d.field(plan, &mut at)? {
            match field {
                Field::Major => {
                    major = d.uint()?;
                    // The rest of a newer one may mean anything: not even looked at.
                    if major > MAJOR {
                        let detail = format!("version {major} of the clip-csi extension, up to {MAJOR} is known");
                        return Err(ArchiveError::Unsupported { detail });
                    }
                }
                Field::Minor => drop(d.uint()?),
                Field::Generator => out.generator = d.string()?,
                Field::SeekPos => pos = d.uint()?,
                Field::SeekLen => len = d.uint()?,
                Field::SeekDigest => digest = Some(parse(d)?),
                Field::Bundle => out.bundle = d.bool()?,
                Field::Manifest => out.manifest_digest = Some(parse(d)?),
                // Shown and not relied on: an odd one is none.
                Field::Platform => out.platform = d.string()?.parse().ok(),
                Field::Layout => out.layout = Some(d.string()?),
                Field::Sum => summed = !d.bytes()?.is_empty(),
            }
        }
        if major == 0 {
            return Err(d.corrupt("the clip-csi extension has no version"));
        }
        out.seek_table = digest.map(|digest| (pos, len, digest));
        if len > super::MAX_SEEK_TABLE_LEN {
            let limit = super::MAX_SEEK_TABLE_LEN;
            return Err(ArchiveError::TooLarge { what: "length of the seek table", value: len, limit });
        }
        if out.seek_table.is_some()
            && (pos < super::HEADER_LEN as u64 || pos.checked_add(len).is_none_or(|end| end > i64::MAX as u64))
        {
            return Err(d.corrupt(format!("a seek table at {pos}, within the header or behind any file's end")));
        }
        Ok((out, summed))
    }
}
