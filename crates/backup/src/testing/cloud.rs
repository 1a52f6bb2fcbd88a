//! An object store in memory that is as bad as a test wants it: late, forgetful, interrupted at every step, by a seed.
//!
//! Left out: real stores (`store`'s tests). Hazard: a store that is kinder than real ones hides faults.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use jiff::Timestamp;
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use super::{Random, time};

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    at: Timestamp,
    /// Since when it is not there any more.
    gone: Option<Timestamp>,
}

/// How bad the store is.
#[derive(Default)]
pub(crate) struct Weather {
    /// Listings show what was there so long ago.
    pub listing_late: Duration,
    /// Listings of a folder end after so many objects.
    pub listing_ends: Option<(String, usize)>,
    /// Before each operation others may go on, so many times at most.
    pub interleave: u64,
    /// The next puts succeed, and say that they failed: the answer is lost.
    pub lose_answers: usize,
    /// Every put fails.
    pub unwritable: bool,
    /// The next puts are refused although nothing is there, as a competing one is in flight.
    pub conflicts: usize,
    /// Bodies are cut off by so many bytes.
    pub cut: usize,
}

/// An object store in memory with a clock of its own.
pub(crate) struct Cloud {
    objects: Mutex<BTreeMap<String, Vec<Object>>>,
    now: Mutex<Timestamp>,
    pub weather: Mutex<Weather>,
    random: Mutex<Random>,
}

impl Cloud {
    pub(crate) fn new(seed: u64) -> Arc<Cloud> {
        Arc::new(Cloud {
            objects: Mutex::default(),
            now: Mutex::new(time("2026-11-20T00:00:00Z")),
            weather: Mutex::default(),
            random: Mutex::new(Random(seed)),
        })
    }

    pub(crate) fn now(&self) -> Timestamp {
        *self.now.lock().unwrap()
    }

    pub(crate) fn pass(&self, time: Duration) {
        *self.now.lock().unwrap() += time;
    }

    pub(crate) fn back(&self, time: Duration) {
        *self.now.lock().unwrap() -= time;
    }

    pub(crate) fn bad(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock().unwrap());
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let objects = self.objects.lock().unwrap();
        let there = |versions: &Vec<Object>| versions.last().is_some_and(|last| last.gone.is_none());
        objects.iter().filter(|(_, versions)| there(versions)).map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn bytes(&self, name: &str) -> Option<Bytes> {
        let objects = self.objects.lock().unwrap();
        objects.get(name)?.last().filter(|last| last.gone.is_none()).map(|last| last.bytes.clone())
    }

    /// What only a fault does: other bytes under a name.
    pub(crate) fn damage(&self, name: &str, bytes: impl Into<Bytes>) {
        let mut objects = self.objects.lock().unwrap();
        objects.get_mut(name).and_then(|versions| versions.last_mut()).unwrap().bytes = bytes.into();
    }

    pub(crate) fn remove(&self, name: &str) {
        let now = self.now();
        let mut objects = self.objects.lock().unwrap();
        objects.get_mut(name).and_then(|versions| versions.last_mut()).unwrap().gone = Some(now);
    }

    async fn turn(&self) {
        let most = self.weather.lock().unwrap().interleave;
        let turns = if most == 0 { 0 } else { self.random.lock().unwrap().below(most + 1) };
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
    }

    fn failed(&self, what: &str) -> Error {
        Error::Generic { store: "a test", source: what.into() }
    }

    fn listed(&self, prefix: Option<&Path>) -> Vec<ObjectMeta> {
        let weather = self.weather.lock().unwrap();
        let folder = prefix.map_or(String::new(), |prefix| format!("{prefix}/"));
        let then = self.now() - weather.listing_late;
        let objects = self.objects.lock().unwrap();
        let visible = |object: &&Object| object.at <= then && object.gone.is_none_or(|gone| gone > then);
        let mut listed: Vec<ObjectMeta> = Vec::new();
        for (name, versions) in objects.iter().filter(|(name, _)| name.starts_with(&folder)) {
            let Some(object) = versions.iter().rev().find(visible) else { continue };
            listed.push(meta(name, object));
        }
        if let Some((of, count)) = &weather.listing_ends
            && folder.contains(of.as_str())
        {
            listed.truncate(*count);
        }
        listed
    }
}

fn meta(name: &str, object: &Object) -> ObjectMeta {
    ObjectMeta {
        location: Path::from(name),
        last_modified: std::time::SystemTime::from(object.at).into(),
        size: object.bytes.len() as u64,
        e_tag: None,
        version: None,
    }
}

impl fmt::Debug for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cloud")
    }
}

impl fmt::Display for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cloud")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Cloud {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        assert_eq!(options.mode, PutMode::Create, "nothing is ever overwritten");
        self.turn().await;
        let exists = || Error::AlreadyExists { path: location.to_string(), source: "it exists".into() };
        let mut weather = self.weather.lock().unwrap();
        if weather.unwritable {
            return Err(self.failed("no answer"));
        }
        if weather.conflicts > 0 {
            weather.conflicts -= 1;
            return Err(exists());
        }
        let now = self.now();
        let mut objects = self.objects.lock().unwrap();
        let versions = objects.entry(location.to_string()).or_default();
        if versions.last().is_some_and(|last| last.gone.is_none()) {
            return Err(exists());
        }
        versions.push(Object { bytes: payload.into(), at: now, gone: None });
        if weather.lose_answers > 0 {
            weather.lose_answers -= 1;
            return Err(self.failed("the answer was lost"));
        }
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(self.failed("a put in parts has no condition"))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.turn().await;
        let cut = self.weather.lock().unwrap().cut;
        let objects = self.objects.lock().unwrap();
        let there = objects.get(location.as_ref()).and_then(|versions| versions.last());
        let Some(object) = there.filter(|object| object.gone.is_none()) else {
            return Err(Error::NotFound { path: location.to_string(), source: "there is none".into() });
        };
        let size = object.bytes.len() as u64;
        let range = match options.range {
            Some(object_store::GetRange::Bounded(range)) => range.start.min(size)..range.end.min(size),
            _ => 0..size,
        };
        let bytes = object.bytes.slice(range.start as usize..range.end as usize);
        let bytes = bytes.slice(..bytes.len().saturating_sub(cut));
        let head = options.head;
        let body = stream::once(async move { Ok(if head { Bytes::new() } else { bytes }) }).boxed();
        Ok(GetResult {
            payload: GetResultPayload::Stream(body),
            meta: meta(location.as_ref(), object),
            range,
            attributes: Attributes::default(),
            extensions: Default::default(),
        })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        // The library wants a stream that outlives the call, and deletions of one object at a time are all there is.
        let deleted =
            futures_util::FutureExt::now_or_never(locations.collect::<Vec<_>>()).unwrap_or_default();
        let now = self.now();
        let mut objects = self.objects.lock().unwrap();
        for location in deleted.iter().flatten() {
            let there = objects.get_mut(location.as_ref()).and_then(|versions| versions.last_mut());
            if let Some(object) = there.filter(|object| object.gone.is_none()) {
                object.gone = Some(now);
            }
        }
        stream::iter(deleted).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let listed = self.listed(prefix);
        stream::iter(listed.into_iter().map(Ok)).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(self.failed("nobody lists like this"))
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(self.failed("nobody copies"))
    }
}
