//! `s3://` URLs, and which buckets and keys are accepted.

use super::super::Location;

/// `s3://bucket/key[?endpoint=URL&region=R&path-style=true]`.
pub(in super::super) fn parse_url(text: &str) -> Result<Location, String> {
    let url = url::Url::parse(text).map_err(|e| e.to_string())?;
    let bucket = url.host_str().unwrap_or("").to_owned();
    let decode = |text: &str| {
        // The URL crate's query parser is its percent-decoder; plus signs in keys stay what they are.
        let escaped = text.replace('+', "%2B").replace('&', "%26").replace('=', "%3D");
        url::form_urlencoded::parse(escaped.as_bytes()).next().map(|(k, _)| k.into_owned()).unwrap_or_default()
    };
    // The crate folds `.` and `..` segments of a URL; a key is what was written.
    let rest = text.trim_start_matches("s3://").split(['?', '#']).next().unwrap_or("");
    let key = rest.split_once('/').map(|(_, key)| decode(key)).unwrap_or_default();
    let (mut endpoint, mut region, mut path_style) = (String::new(), String::new(), false);
    for (name, value) in url.query_pairs() {
        match name.as_ref() {
            "endpoint" => endpoint = value.into_owned(),
            "region" => region = value.into_owned(),
            "path-style" => path_style = value.parse().map_err(|_| "path-style is true or false".to_owned())?,
            other => return Err(format!("{other} is not one of endpoint, region, path-style")),
        }
    }
    if bucket.is_empty() {
        return Err("names no bucket".into());
    }
    if !endpoint.is_empty() && super::super::policy::normal_endpoint(&endpoint).is_none() {
        return Err("endpoint is not a URL like https://host:port".into());
    }
    Ok(Location::S3 { endpoint, region, bucket, key, path_style })
}

/// The inverse of [`parse_url`].
pub(in super::super) fn format_url(endpoint: &str, region: &str, bucket: &str, key: &str, path_style: bool) -> String {
    let key = key.replace('%', "%25").replace('?', "%3F").replace('#', "%23");
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    for (name, value) in [("endpoint", endpoint), ("region", region)] {
        if !value.is_empty() {
            query.append_pair(name, value);
        }
    }
    if path_style {
        query.append_pair("path-style", "true");
    }
    let query = query.finish();
    format!("s3://{bucket}/{key}{}{query}", if query.is_empty() { "" } else { "?" })
}

/// Why a bucket or key can't be used; `None`: it can. `untrusted`: an archive or a volume names it.
pub(super) fn objection(bucket: &str, key: &str, untrusted: bool) -> Option<&'static str> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    // The bucket may become part of the host name: nothing in it may end that name.
    if !(3..=255).contains(&bucket.len()) || !bucket.bytes().all(allowed) || bucket.contains("..") {
        return Some("the bucket's name is not valid (an access point is named by its alias)");
    }
    if key.len() > 1024 || key.contains('\0') {
        return Some("the key is longer than 1024 bytes or not valid");
    }
    // Proxies and servers fold such segments: the key that is checked would not be the key that is read.
    (untrusted && key.split('/').any(|s| matches!(s, "." | ".."))).then_some("the key holds `.` or `..` segments")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_steer_a_request_are_refused() {
        for bucket in ["", "ab", "a/b", "host@evil", "evil.example#", "b?x", "a..b", "arn:aws:s3:::b", "b:80"] {
            assert!(objection(bucket, "k", false).is_some(), "{bucket}");
        }
        assert!(objection("bucket", "a/../b", true).is_some());
        assert!(objection("bucket", "a/../b", false).is_none());
        assert!(objection("My_bucket.1-a", "a//b/..c", true).is_none());
        assert!(objection("bucket", &"k".repeat(1025), false).is_some());
    }
}
