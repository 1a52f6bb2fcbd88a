//! Both kinds of stores under faults: kills and power cuts at every step, races, full disks, lost answers.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::{Cloud, Random, run};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

const STEPS: [Step; 9] = [
    Step::MakeDirectory,
    Step::SyncParent,
    Step::Create,
    Step::Write,
    Step::WriteRest,
    Step::SyncFile,
    Step::Link,
    Step::SyncDirectory,
    Step::RemoveTemporary,
];

/// A disk that remembers what is durable. When its power is cut, files that were not flushed are empty, and names that
/// were not flushed with their directory are gone.
#[derive(Default)]
struct Disk {
    fail_at: Option<usize>,
    /// A step that a broken build leaves out.
    left_out: Option<Step>,
    steps: Vec<(Step, PathBuf)>,
    flushed: BTreeSet<PathBuf>,
}

impl Disk {
    fn directory(
        root: &Path,
        fail_at: Option<usize>,
        left_out: Option<Step>,
    ) -> (Directory, Arc<Mutex<Disk>>) {
        let disk = Arc::new(Mutex::new(Disk { fail_at, left_out, ..Default::default() }));
        let hook = {
            let disk = Arc::clone(&disk);
            move |step: Step, path: &Path| disk.lock().unwrap().step(step, path)
        };
        (Directory::with_hook(root.to_owned(), hook), disk)
    }

    fn step(&mut self, step: Step, path: &Path) -> io::Result<bool> {
        // A process that was killed does nothing any more.
        if self.fail_at.is_some_and(|at| self.steps.len() >= at) {
            return Err(io::Error::other("killed"));
        }
        self.steps.push((step, path.to_owned()));
        if self.left_out == Some(step) {
            return Ok(false);
        }
        if matches!(step, Step::SyncFile | Step::SyncDirectory | Step::SyncParent) {
            self.flushed.insert(path.to_owned());
        }
        Ok(true)
    }

    /// Takes away what was not durable, in the worst way that a file system may.
    fn cut_power(&self, root: &Path) {
        let at = |wanted: Step| self.steps.iter().rposition(|(step, _)| *step == wanted);
        for (step, path) in &self.steps {
            if *step == Step::Link && path.exists() {
                let folder_flushed =
                    at(Step::SyncDirectory) > at(Step::Link) && self.flushed.contains(path.parent().unwrap());
                let content_flushed =
                    self.flushed.iter().any(|flushed| flushed.starts_with(root.join(".incoming")));
                if !content_flushed {
                    std::fs::write(path, b"").unwrap();
                } else if !folder_flushed {
                    std::fs::remove_file(path).unwrap();
                }
            }
        }
    }
}

fn incoming(root: &Path) -> usize {
    std::fs::read_dir(root.join(".incoming")).map_or(0, Iterator::count)
}

/// Puts an object with a fault at a step, cuts the power, and says what is wrong then.
fn after_a_kill(at: usize, left_out: Option<Step>) -> (bool, Result<(), String>) {
    let root = tempfile::tempdir().unwrap();
    let object = name("packs/one");
    let content = Random(at as u64).bytes(50_000);
    let (directory, disk) = Disk::directory(root.path(), Some(at), left_out);
    let put = directory.put(&object, &content);
    let complete = disk.lock().unwrap().steps.len() < at;
    disk.lock().unwrap().cut_power(root.path());

    let survivor = Directory::new(root.path().to_owned());
    let verdict = match (put, survivor.read(&object, 1 << 20)) {
        (Ok(_), Ok(there)) if there != content => Err("it was said to be durable, and is another".to_owned()),
        (Ok(_), Err(_)) => Err("it was said to be durable, and is gone".to_owned()),
        (Err(_), Ok(there)) if there != content => Err(format!("{} bytes have its name", there.len())),
        (Err(_), Err((failure, _))) if failure != Failure::Absent => {
            Err(format!("reading it fails: {failure}"))
        }
        _ => Ok(()),
    };
    // Whatever was left, the next one succeeds, and the leftovers can be swept.
    survivor.sweep().unwrap();
    assert_eq!(incoming(root.path()), 0, "leftovers of a kill at step {at} are swept");
    if verdict.is_ok() {
        survivor.put(&object, &content).unwrap();
        assert_eq!(survivor.read(&object, 1 << 20).unwrap(), content);
    }
    (complete, verdict)
}

#[test]
fn a_kill_or_power_cut_at_any_step_leaves_the_whole_object_or_none() {
    let mut at = 0;
    loop {
        let (complete, verdict) = after_a_kill(at, None);
        assert_eq!(verdict, Ok(()), "killed at step {at}");
        if complete {
            break;
        }
        at += 1;
    }
    assert!(at > STEPS.len(), "every step was reached: only {at} were");
}

#[test]
fn a_build_that_leaves_a_flush_out_is_caught() {
    for left_out in [Step::SyncFile, Step::SyncDirectory] {
        let caught = (0..20).any(|at| after_a_kill(at, Some(left_out)).1.is_err());
        assert!(caught, "without {left_out:?} nothing was lost");
    }
}

#[test]
fn an_error_at_any_step_names_what_failed_and_leaves_nothing_half_written() {
    let root = tempfile::tempdir().unwrap();
    for (code, failure) in [
        (rustix::io::Errno::NOSPC, Failure::Full),
        (rustix::io::Errno::DQUOT, Failure::Full),
        (rustix::io::Errno::ROFS, Failure::Denied),
        (rustix::io::Errno::ACCESS, Failure::Denied),
        (rustix::io::Errno::IO, Failure::Failed),
    ] {
        for wanted in STEPS {
            let hook = move |step: Step, _: &Path| {
                let wrong = step == wanted;
                if wrong { Err(io::Error::from_raw_os_error(code.raw_os_error())) } else { Ok(true) }
            };
            let object = name(&format!("x/{wanted:?}-{}/object", code.raw_os_error()));
            let store = Store::with_directory(Directory::with_hook(root.path().to_owned(), hook));
            let put = run(store.put(&object, Bytes::from_static(b"content")));
            let survivor = Store::directory(root.path());
            let there = run(survivor.read_plainly(&object, 100));
            if wanted == Step::RemoveTemporary {
                assert_eq!(
                    put.unwrap(),
                    Put::Created,
                    "the object is there; a temporary file is nobody's loss"
                );
            } else {
                let error = put.unwrap_err();
                assert_eq!(error.failure, failure, "{wanted:?}: {error}");
                assert!(error.failure.is_unsure() && error.to_string().contains(object.as_str()), "{error}");
                assert!(Error::source(&error).is_some(), "{error} has a cause");
            }
            assert!(there.is_err() || there.unwrap() == "content", "{wanted:?} left half an object");
        }
    }
    run(Store::directory(root.path()).sweep()).unwrap();
    assert_eq!(incoming(root.path()), 0);
}

#[test]
fn a_file_system_without_hard_links_renames_without_replacing() {
    let root = tempfile::tempdir().unwrap();
    let hook = |step: Step, _: &Path| match step {
        Step::Link => Err(io::Error::from_raw_os_error(rustix::io::Errno::PERM.raw_os_error())),
        _ => Ok(true),
    };
    let store = Store::with_directory(Directory::with_hook(root.path().to_owned(), hook));
    run(async {
        assert_eq!(store.put(&name("a"), "one".into()).await.unwrap(), Put::Created);
        assert_eq!(store.put(&name("a"), "two".into()).await.unwrap_err().failure, Failure::Present);
        assert_eq!(store.read_plainly(&name("a"), 10).await.unwrap(), "one");
    });
    assert_eq!(incoming(root.path()), 0);
}

#[test]
fn a_sweep_leaves_what_is_being_written() {
    let root = tempfile::tempdir().unwrap();
    let inside = root.path().to_owned();
    let hook = move |step: Step, _: &Path| {
        if step == Step::SyncFile {
            assert_eq!(Directory::new(inside.clone()).sweep().unwrap(), 0, "its writer lives");
        }
        Ok(true)
    };
    let writer = Directory::with_hook(root.path().to_owned(), hook);
    assert!(writer.put(&name("a"), b"content").unwrap());
    std::fs::write(root.path().join(".incoming/b.0011"), b"half").unwrap();
    assert_eq!(writer.sweep().unwrap(), 1, "nobody holds the leftover");
}

fn stores() -> Vec<(Store, Option<tempfile::TempDir>)> {
    let root = tempfile::tempdir().unwrap();
    let memory = Arc::new(object_store::memory::InMemory::new());
    vec![
        (Store::directory(root.path()), Some(root)),
        (Store::over(memory), None),
        (Store::over(Cloud::new(1)), None),
    ]
}

#[test]
fn nothing_is_overwritten_and_the_same_again_is_fine() {
    for (store, _root) in stores() {
        run(async {
            store.probe().await.unwrap();
            assert_eq!(store.put(&name("format"), "x".into()).await.unwrap(), Put::Created);
            assert_eq!(store.put(&name("a/b"), "one".into()).await.unwrap(), Put::Created);
            assert_eq!(store.put(&name("a/b"), "one".into()).await.unwrap(), Put::Same);
            let refused = store.put(&name("a/b"), "two".into()).await.unwrap_err();
            assert_eq!(refused.failure, Failure::Present, "{refused}");
            assert_eq!(store.read(&name("a/b"), 3).await.unwrap(), "one");
            assert_eq!(store.read_range(&name("a/b"), 1..3).await.unwrap(), "ne");
            let short = store.read_range(&name("a/b"), 1..9).await.unwrap_err();
            assert_eq!(short.failure, Failure::Misbehaving, "{short}");
            assert_eq!(store.read(&name("a/b"), 2).await.unwrap_err().failure, Failure::TooLarge);
            assert!(store.read(&name("a/c"), 3).await.unwrap_err().is_absent());
            assert_eq!(store.head(&name("a/b")).await.unwrap().bytes, 3);
            store.delete(&name("a/b")).await.unwrap();
            store.delete(&name("a/b")).await.unwrap();
            assert!(store.head(&name("a/b")).await.unwrap_err().is_absent());
        });
    }
}

#[test]
fn what_is_not_mounted_is_not_empty() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::directory(root.path());
    run(async {
        let error = store.read(&name("cluster/1/wal/x"), 10).await.unwrap_err();
        assert_eq!(error.failure, Failure::NoRepository, "absent would let PostgreSQL promote: {error}");
        let error = store.put(&name("cluster/1/wal/x"), "x".into()).await.unwrap_err();
        assert_eq!(error.failure, Failure::NoRepository, "nothing is written below a mount point: {error}");
        assert!(store.read(&name::format(), 10).await.unwrap_err().is_absent(), "a new one can be made");
        let gone = Store::directory(root.path().join("gone"));
        assert_eq!(gone.list("a/", None, 5).await.unwrap_err().failure, Failure::NoRepository);
    });
    let cloud = Store::over(Cloud::new(1));
    let error = run(cloud.read(&name("cluster/1/wal/x"), 10)).unwrap_err();
    assert_eq!(error.failure, Failure::NoRepository);
}

#[test]
fn of_two_writers_one_wins_and_the_other_is_told() {
    for (store, _root) in stores() {
        for round in 0..20 {
            let object = name(&format!("race/{round}"));
            let race = |content: &'static str| {
                let (store, object) = (store.clone(), object.clone());
                async move { store.put(&object, content.into()).await }
            };
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
            let (one, two) = runtime.block_on(async {
                let (one, two) = (tokio::spawn(race("one")), tokio::spawn(race("two")));
                (one.await.unwrap(), two.await.unwrap())
            });
            let winner = match (&one, &two) {
                (Ok(Put::Created), Err(error)) if error.failure == Failure::Present => "one",
                (Err(error), Ok(Put::Created)) if error.failure == Failure::Present => "two",
                other => panic!("one creates and one is told: {other:?}"),
            };
            assert_eq!(runtime.block_on(store.read_plainly(&object, 10)).unwrap(), winner);
        }
    }
}

#[test]
fn listings_come_in_order_page_by_page() {
    for (store, _root) in stores() {
        run(async {
            let names = ["l/a-b/c", "l/a.b", "l/a/b", "l/a/c/d", "l/ab", "l/b/1", "l/b/2", "m/x"];
            for name in names {
                store.put(&name.parse().unwrap(), name.into()).await.unwrap();
            }
            let mut sorted: Vec<&str> = names.into_iter().filter(|name| name.starts_with("l/")).collect();
            sorted.sort_unstable();
            for limit in 1..=sorted.len() + 1 {
                let mut seen: Vec<String> = Vec::new();
                let mut after = None;
                loop {
                    let page = store.list("l/", after.as_ref(), limit).await.unwrap();
                    assert!(page.objects.len() <= limit);
                    after = page.objects.last().map(|last| last.name.clone()).or(after);
                    seen.extend(page.objects.iter().map(|listed| listed.name.to_string()));
                    if !page.more {
                        break;
                    }
                }
                assert_eq!(seen, sorted, "with pages of {limit}");
            }
            assert_eq!(store.list("none/", None, 5).await.unwrap(), Page::default());
        });
    }
}

#[test]
fn a_lost_answer_and_a_competing_put_are_no_failure() {
    let cloud = Cloud::new(1);
    let store = Store::over(Arc::clone(&cloud) as Arc<dyn object_store::ObjectStore>);
    run(async {
        cloud.bad(|weather| weather.lose_answers = 1);
        let error = store.put(&name("a"), "one".into()).await.unwrap_err();
        assert_eq!(error.failure, Failure::Failed, "nobody knows: {error}");
        assert_eq!(store.put(&name("a"), "one".into()).await.unwrap(), Put::Same, "it was our own");
        tokio::time::pause();
        cloud.bad(|weather| weather.conflicts = 3);
        assert_eq!(store.put(&name("b"), "one".into()).await.unwrap(), Put::Created);
        cloud.bad(|weather| weather.conflicts = 1000);
        let error = store.put(&name("c"), "one".into()).await.unwrap_err();
        assert_eq!(error.failure, Failure::Failed, "neither present nor written: {error}");
    });
}

#[test]
fn a_body_that_is_cut_off_is_no_object() {
    let cloud = Cloud::new(1);
    let store = Store::over(Arc::clone(&cloud) as Arc<dyn object_store::ObjectStore>);
    run(async {
        store.put(&name("a"), "content".into()).await.unwrap();
        cloud.bad(|weather| weather.cut = 1);
        assert_eq!(store.read(&name("a"), 100).await.unwrap_err().failure, Failure::Misbehaving);
        assert_eq!(store.read_range(&name("a"), 0..4).await.unwrap_err().failure, Failure::Misbehaving);
    });
}

/// A store that ignores the condition of a put, as some do.
#[test]
fn a_store_that_overwrites_is_found_out() {
    #[derive(Debug)]
    struct Careless(object_store::memory::InMemory);
    impl fmt::Display for Careless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Careless")
        }
    }
    #[async_trait::async_trait]
    impl object_store::ObjectStore for Careless {
        async fn put_opts(
            &self,
            location: &object_store::path::Path,
            payload: object_store::PutPayload,
            _: object_store::PutOptions,
        ) -> object_store::Result<object_store::PutResult> {
            self.0.put_opts(location, payload, Default::default()).await
        }
        async fn put_multipart_opts(
            &self,
            location: &object_store::path::Path,
            options: object_store::PutMultipartOptions,
        ) -> object_store::Result<Box<dyn object_store::MultipartUpload>> {
            self.0.put_multipart_opts(location, options).await
        }
        async fn get_opts(
            &self,
            location: &object_store::path::Path,
            options: object_store::GetOptions,
        ) -> object_store::Result<object_store::GetResult> {
            self.0.get_opts(location, options).await
        }
        fn delete_stream(
            &self,
            locations: futures_util::stream::BoxStream<
                'static,
                object_store::Result<object_store::path::Path>,
            >,
        ) -> futures_util::stream::BoxStream<'static, object_store::Result<object_store::path::Path>>
        {
            self.0.delete_stream(locations)
        }
        fn list(
            &self,
            prefix: Option<&object_store::path::Path>,
        ) -> futures_util::stream::BoxStream<'static, object_store::Result<object_store::ObjectMeta>>
        {
            self.0.list(prefix)
        }
        async fn list_with_delimiter(
            &self,
            prefix: Option<&object_store::path::Path>,
        ) -> object_store::Result<object_store::ListResult> {
            self.0.list_with_delimiter(prefix).await
        }
        async fn copy_opts(
            &self,
            from: &object_store::path::Path,
            to: &object_store::path::Path,
            options: object_store::CopyOptions,
        ) -> object_store::Result<()> {
            self.0.copy_opts(from, to, options).await
        }
    }
    let store = Store::over(Arc::new(Careless(object_store::memory::InMemory::new())));
    let error = run(store.probe()).unwrap_err();
    assert_eq!(error.failure, Failure::Misbehaving, "{error}");
}

#[test]
fn no_credential_is_printed() {
    let credentials = Credentials {
        access_key: Some("the access key".to_owned()),
        secret_key: Some("the secret key".to_owned()),
        ..Credentials::default()
    };
    let store = Store::s3("s3://bucket/folder", credentials.clone()).unwrap();
    let printed = format!("{credentials:?} {store:?}");
    assert!(!printed.contains("the access key") && !printed.contains("the secret key"), "{printed}");
    assert!(Store::s3("bucket/folder", credentials).is_err());
}
