//! What an image's configuration says of its platform: more than was asked for, or nonsense.

mod common;

use std::path::Path;

use clip_csi::archive::Version;
use clip_csi::build::provider::{ImageServiceConfig, Provided, Provider, PullPolicy, Request};
use clip_csi::build::{BuildError, BuildOptions, index_image, progress::Silent};
use clip_csi::cache::{Cache, CacheConfig};
use clip_csi::fs::{OpenOptions, open};
use clip_csi::source::policy::SourceConfig;
use clip_csi::source::{ImageRef, Location};
use clip_csi::units::{Compression, Platform};
use common::layers::{Layer, change_config, write_layout};

fn layout(dir: &Path, platform: &[(&str, &str)]) -> ImageRef {
    write_layout(dir, vec![Layer::new(Compression::Gzip).file("a", b"a")]);
    change_config(dir, |config| platform.iter().for_each(|(key, value)| config[*key] = (*value).into()));
    ImageRef::Layout { dir: dir.to_owned(), tag: Some("latest".into()) }
}

/// Arm images name a variant, which nobody asks for.
#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_own_archive_is_found_whatever_variant_the_image_names() {
    let dir = tempfile::tempdir().unwrap();
    let image = layout(&dir.path().join("image"), &[("variant", "v8")]);
    let archives = dir.path().join("archives");
    let provide = async |pull_policy| -> Result<Provided, BuildError> {
        let config = ImageServiceConfig { archive_dir: archives.clone(), referrers: false, ..Default::default() };
        let (image, credentials) = (image.clone(), Default::default());
        let request = Request { image, platform: Platform::host(), version: Version::V2, pull_policy, credentials };
        Provider::new(config, common::sources(true, SourceConfig::default())).unwrap().provide(&request).await
    };
    assert!(provide(PullPolicy::Never).await.is_err());
    let built = provide(PullPolicy::IfNotPresent).await.unwrap();
    let Location::File(path) = &built.location else { panic!("{:?}", built.location) };
    assert!(path.to_string_lossy().contains("-v8-"), "{}", path.display());
    for policy in [PullPolicy::Never, PullPolicy::IfNotPresent] {
        let found = provide(policy).await.unwrap();
        assert_eq!((found.location, found.from), (built.location.clone(), "node"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_of_an_image_with_an_odd_platform_can_be_opened() {
    for odd in [[("variant", "v8 r2")], [("os", "Linux (test)")], [("architecture", "x/86")]] {
        let dir = tempfile::tempdir().unwrap();
        let image = layout(&dir.path().join("image"), &odd);
        let sources = common::sources(true, SourceConfig::default());
        let resolved = sources.resolve(&image, &Platform::host(), &Default::default()).await.unwrap();
        assert_eq!(resolved.platform, Platform::host());
        let out = dir.path().join("a.clip");
        index_image(&resolved, &out, &BuildOptions::default(), &Silent).await.unwrap();
        let cache = Cache::open(&CacheConfig { dir: dir.path().join("cache"), ..Default::default() }).unwrap();
        let archive = sources.open(&Location::File(out), &Default::default()).await.unwrap();
        open(archive, &sources, &cache, &OpenOptions::default()).await.unwrap();
    }
}
