//! Objects in an object store, through the library `object_store`: it speaks S3, signs, retries and limits the time.
//!
//! What is added here is what the library leaves open. A put that is refused because of a competing one in flight is
//! reported like one that found an object, so it is asked whether there is one. Answers are compared with what was asked.
//!
//! Left out: Google's and Microsoft's stores, which are features of the same library and need an opening function each.
//! Hazard: a condition that a store ignores overwrites; `Store::probe` asks for it before a repository is made.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use object_store::aws::{AmazonS3Builder, Checksum};
use object_store::client::HttpError;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{
    ClientOptions, Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig,
};

use super::{Failed, Failure, Listed, Page, Source};
use crate::name::Name;

/// How often a read is tried again whose answer broke off, which the library does not do for listings, and the first pause.
const BROKEN_OFF: u32 = 5;
const BROKEN_OFF_PAUSE: Duration = Duration::from_millis(100);
/// What has failed for longer was tried again by the library.
const BROKEN_OFF_WITHIN: Duration = Duration::from_secs(20);
/// For how long a request is tried again. Below the five minutes for which a signature is good.
const RETRY_FOR: Duration = Duration::from_secs(60);
/// One request: the largest object over a line of 10 MB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(110);
/// How often a put is tried whose competitor was gone when it was looked for, and the pause before the next try.
const CONFLICTS: u32 = 5;
const CONFLICT_PAUSE: Duration = Duration::from_millis(200);

/// How to come into an S3 bucket. What is not given comes from nowhere else: the environment of a process is no place
/// for what a herd file decides.
#[derive(Clone, Default)]
pub struct Credentials {
    pub access_key: Option<String>,
    pub secret_key: Option<String>,
    pub region: Option<String>,
    /// For stores that are not Amazon's: `https://host:port`.
    pub endpoint: Option<String>,
    /// Whether an endpoint may be spoken to without TLS.
    pub allow_http: bool,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("region", &self.region)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

pub(super) fn s3(url: &str, credentials: Credentials) -> Result<Arc<dyn ObjectStore>, Source> {
    let rest = url.strip_prefix("s3://").ok_or("it is not an address such as s3://bucket/folder")?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let retry = RetryConfig { retry_timeout: RETRY_FOR, ..RetryConfig::default() };
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(credentials.region.as_deref().unwrap_or("us-east-1"))
        .with_allow_http(credentials.allow_http)
        // A bucket with Object Lock takes nothing without one.
        .with_checksum_algorithm(Checksum::SHA256)
        // One request for each object is what every store has; deletions are rare.
        .with_disable_bulk_delete(true)
        .with_client_options(
            ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_allow_http(credentials.allow_http),
        )
        .with_retry(retry);
    if let Some(endpoint) = credentials.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let (Some(access), Some(secret)) = (credentials.access_key, credentials.secret_key) {
        builder = builder.with_access_key_id(access).with_secret_access_key(secret);
    }
    let bucket = builder.build()?;
    let prefix = Path::parse(prefix.trim_end_matches('/'))?;
    if prefix.as_ref().is_empty() {
        return Ok(Arc::new(bucket));
    }
    Ok(Arc::new(PrefixStore::new(bucket, prefix)))
}

/// Whether it was created; if not, an object of that name is there.
pub(super) async fn put(store: &dyn ObjectStore, name: &Name, bytes: &Bytes) -> Result<bool, Failed> {
    let path = Path::from(name.as_str());
    let mut conflicts = 0;
    loop {
        let payload = PutPayload::from_bytes(bytes.clone());
        let refused = match store.put_opts(&path, payload, PutOptions::from(PutMode::Create)).await {
            Ok(_) => return Ok(true),
            Err(error @ (Error::AlreadyExists { .. } | Error::Precondition { .. })) => error,
            Err(error) => return Err(failed(error)),
        };
        match store.head(&path).await {
            Ok(_) => return Ok(false),
            Err(Error::NotFound { .. }) if conflicts < CONFLICTS => {
                conflicts += 1;
                tokio::time::sleep(CONFLICT_PAUSE).await;
            }
            Err(Error::NotFound { .. }) => return Err((Failure::Failed, Box::new(refused))),
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Whether an answer came, and not all of it; what the store said instead of one is no reason to ask again.
fn broke_off(failure: Failure, why: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(why), |cause| cause.source());
    failure == Failure::Misbehaving || causes.any(|cause| cause.is::<HttpError>())
}

/// Reads what an answer that breaks off has not brought.
async fn in_full<T, F: Future<Output = Result<T, Failed>>>(mut read: impl FnMut() -> F) -> Result<T, Failed> {
    let began = Instant::now();
    let mut pause = BROKEN_OFF_PAUSE;
    for _ in 1..BROKEN_OFF {
        match read().await {
            Err((failure, why)) if began.elapsed() < BROKEN_OFF_WITHIN && broke_off(failure, &*why) => {}
            other => return other,
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    read().await
}

pub(super) async fn read(store: &dyn ObjectStore, name: &Name, limit: u64) -> Result<Bytes, Failed> {
    in_full(|| read_once(store, name, limit)).await
}

async fn read_once(store: &dyn ObjectStore, name: &Name, limit: u64) -> Result<Bytes, Failed> {
    let found = store.get(&Path::from(name.as_str())).await.map_err(failed)?;
    let size = found.meta.size;
    if size > limit {
        return Err((Failure::TooLarge, format!("{size} bytes, the limit is {limit}").into()));
    }
    let bytes = found.bytes().await.map_err(failed)?;
    if bytes.len() as u64 != size {
        let why = format!("{} of {size} bytes came", bytes.len());
        return Err((Failure::Misbehaving, why.into()));
    }
    Ok(bytes)
}

pub(super) async fn read_range(
    store: &dyn ObjectStore,
    name: &Name,
    range: Range<u64>,
) -> Result<Bytes, Failed> {
    in_full(|| async {
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let found = store.get_opts(&Path::from(name.as_str()), options).await.map_err(failed)?;
        found.bytes().await.map_err(failed)
    })
    .await
}

pub(super) async fn head(store: &dyn ObjectStore, name: &Name) -> Result<Listed, Failed> {
    let found = store.head(&Path::from(name.as_str())).await.map_err(failed)?;
    listed(&found, name.clone())
}

pub(super) async fn list(
    store: &dyn ObjectStore,
    prefix: &str,
    after: Option<&Name>,
    limit: usize,
) -> Result<Page, Failed> {
    in_full(|| list_once(store, prefix, after, limit)).await
}

async fn list_once(
    store: &dyn ObjectStore,
    prefix: &str,
    after: Option<&Name>,
    limit: usize,
) -> Result<Page, Failed> {
    let folder = Path::from(prefix.trim_end_matches('/'));
    let mut stream = match after {
        Some(after) => store.list_with_offset(Some(&folder), &Path::from(after.as_str())),
        None => store.list(Some(&folder)),
    };
    let mut page = Page::default();
    while let Some(object) = stream.next().await {
        let object = object.map_err(failed)?;
        // What has no name of ours is nobody's.
        let Ok(name) = object.location.as_ref().parse::<Name>() else { continue };
        if page.objects.len() == limit {
            page.more = true;
            break;
        }
        page.objects.push(listed(&object, name)?);
    }
    Ok(page)
}

pub(super) async fn delete(store: &dyn ObjectStore, name: &Name) -> Result<(), Failed> {
    store.delete(&Path::from(name.as_str())).await.map_err(failed)
}

fn listed(object: &ObjectMeta, name: Name) -> Result<Listed, Failed> {
    let modified = Timestamp::from_millisecond(object.last_modified.timestamp_millis());
    let modified = modified.map_err(|error| (Failure::Misbehaving, error.into()))?;
    Ok(Listed { name, bytes: object.size, modified })
}

fn failed(error: Error) -> Failed {
    let failure = match &error {
        Error::NotFound { .. } => Failure::Absent,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Failure::Denied,
        _ => Failure::Failed,
    };
    (failure, Box::new(error))
}

#[cfg(test)]
mod tests;
