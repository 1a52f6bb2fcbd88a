//! Objects in an object store, through the library `object_store`: it speaks S3, and as Google's and Microsoft's stores do, signs,
//! retries and limits the time.
//!
//! What is added here is what the library leaves open. A put that is refused because of a competing one in flight is
//! reported like one that found an object, so it is asked whether there is one. Answers are compared with what was asked.
//!
//! Left out: where a store is and who is let in ([`opening`]). Hazard: a condition that a store ignores overwrites; `Store::probe`
//! asks for it before a repository is made.

use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use object_store::client::HttpError;
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};

use super::{Failed, Failure, Listed, Page, Source};
use crate::name::Name;

mod opening;

pub use opening::{AzureCredentials, AzureKey, Credentials, GcsCredentials};
pub(super) use opening::{azure, gcs, s3};

/// How often a read is tried again whose answer broke off, which the library does not do for listings, and the first pause.
const BROKEN_OFF: u32 = 5;
const BROKEN_OFF_PAUSE: Duration = Duration::from_millis(100);
/// What has failed for longer was tried again by the library.
const BROKEN_OFF_WITHIN: Duration = Duration::from_secs(20);
/// How often a put is tried whose competitor was gone when it was looked for, and the pause before the next try.
const CONFLICTS: u32 = 5;
const CONFLICT_PAUSE: Duration = Duration::from_millis(200);

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
        // A store that does not know where to begin begins at the beginning, as some versions of Microsoft's do.
        if page.objects.is_empty() && after.is_some_and(|after| name <= *after) {
            continue;
        }
        if page.objects.len() == limit {
            page.more = true;
            break;
        }
        page.objects.push(listed(&object, name)?);
    }
    Ok(page)
}

pub(super) async fn delete(store: &dyn ObjectStore, name: &Name) -> Result<(), Failed> {
    // Microsoft's store answers with a body.
    in_full(|| async { store.delete(&Path::from(name.as_str())).await.map_err(failed) }).await
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
