//! Making and opening repositories, keys and their rotation, and bytes of format 1 as they were written once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::document::Damage;
use crate::keys::SecretError;
use crate::manifest::{self, Outcome};
use crate::receive::Object;
use crate::testing::{
    Cloud, PLACE, Random, archive, encrypted, read_back, repository, run, segment, take, time, wal,
};
use crate::wal::Fetched;
use pgherd_core::types::Timeline;

/// Few rounds, so that tests are fast; how many there were is in the object.
const FEW: u32 = 10;

fn store(cloud: &Arc<Cloud>) -> Store {
    Store::over(Arc::clone(cloud) as Arc<dyn object_store::ObjectStore>)
}

fn passphrase(text: &str) -> Secret {
    Secret::passphrase(text).unwrap()
}

#[test]
fn clusters_are_those_of_which_anything_is_there() {
    run(async {
        let cloud = Cloud::new(1);
        let repository = repository(&cloud).await;
        assert_eq!(repository.clusters().await.unwrap(), []);
        let history = b"1\t0/3000000\tno reason\n";
        // As texts 9 comes last, and 12 is the beginning of 123.
        let systems = [12, 123, 9].map(SystemId);
        for system in systems {
            let archive =
                crate::wal::Archive::new(&repository, system, crate::wal::Segments::new(1 << 20).unwrap());
            archive.put_history(Timeline(2), history).await.unwrap();
        }
        assert_eq!(repository.clusters().await.unwrap(), systems);
        let stray = "cluster/x7/history/00000002".parse().unwrap();
        repository.store().put(&stray, bytes::Bytes::from_static(b"?")).await.unwrap();
        let refused = repository.clusters().await.unwrap_err();
        assert!(refused.to_string().contains("cluster/x7"), "{refused}");
    });
}

#[test]
fn a_repository_is_made_once_and_opened_by_its_secret_alone() {
    run(async {
        let cloud = Cloud::new(1);
        let secret = passphrase("correct horse battery\n");
        let none = Repository::open(store(&cloud), None).await.unwrap_err();
        assert!(matches!(none, OpenError::NoRepository { .. }), "{none}");
        let made = Repository::create_with(store(&cloud), Some(&secret), cloud.now(), FEW).await.unwrap();
        let twice = Repository::create_with(store(&cloud), None, cloud.now(), FEW).await.unwrap_err();
        assert!(matches!(twice, OpenError::Exists { .. }), "{twice}");

        let opened = Repository::open(store(&cloud), Some(&secret)).await.unwrap();
        assert_eq!((opened.format(), opened.keys()), (made.format(), made.keys()));
        let wrong = Repository::open(store(&cloud), Some(&passphrase("incorrect horse"))).await.unwrap_err();
        assert!(matches!(wrong, OpenError::Keys(KeysError::WrongSecret { generation: 1, .. })), "{wrong}");
        assert!(!wrong.to_string().contains("horse") && !format!("{wrong:?}").contains("horse"), "{wrong:?}");
        let kind = Repository::open(store(&cloud), Some(&Secret::Key([1; 32]))).await.unwrap_err();
        assert!(matches!(kind, OpenError::Keys(KeysError::OtherKindOfSecret { .. })), "{kind}");
        let without = Repository::open(store(&cloud), None).await.unwrap_err();
        assert!(matches!(without, OpenError::SecretNeeded { .. }), "{without}");

        let open = Cloud::new(2);
        repository(&open).await;
        let needless = Repository::open(store(&open), Some(&secret)).await.unwrap_err();
        assert!(matches!(needless, OpenError::NotEncrypted { .. }), "{needless}");
    });
}

#[test]
fn of_two_who_make_a_repository_one_does() {
    run(async {
        for seed in 0..30 {
            let cloud = Cloud::new(seed);
            cloud.bad(|weather| weather.interleave = 4);
            let secret = Secret::Key([3; 32]);
            let make = || Repository::create(store(&cloud), Some(&secret), cloud.now());
            let (one, two) = tokio::join!(make(), make());
            assert_eq!(
                usize::from(one.is_ok()) + usize::from(two.is_ok()),
                1,
                "seed {seed}: {one:?} {two:?}"
            );
            Repository::open(store(&cloud), Some(&secret)).await.unwrap();
            let keys = cloud.names().iter().filter(|name| name.starts_with("keys/")).count();
            assert_eq!(keys, 1, "the other one's keys are removed");
        }
    });
}

#[test]
fn keys_are_rotated_without_rewriting_anything() {
    run(async {
        let cloud = Cloud::new(1);
        let old = passphrase("the first passphrase");
        let new = passphrase("the second passphrase");
        let first = Repository::create_with(store(&cloud), Some(&old), cloud.now(), FEW).await.unwrap();
        let files = [(b"a".as_slice(), Random(1).bytes(20_000))];
        let before = take(&first, None, &files, 3, cloud.now()).await;
        let untouched = cloud.names();

        let keys = first.keys().unwrap();
        let rotated = keys.rotate_with(&store(&cloud), &new, true, FEW).await.unwrap();
        assert_eq!((rotated.generation(), rotated.ring().current()), (2, Some(2)));
        let late = keys.rotate_with(&store(&cloud), &old, true, FEW).await.unwrap_err();
        assert!(matches!(late, KeysError::Rotated { .. }), "two rotations at once: {late}");

        let second = Repository::open(store(&cloud), Some(&new)).await.unwrap();
        assert_eq!(read_back(&second, &before).await.unwrap()[b"a".as_slice()], files[0].1);
        cloud.pass(std::time::Duration::from_secs(5));
        let after = take(&second, None, &files, 3, cloud.now()).await;
        assert_eq!(read_back(&second, &after).await.unwrap()[b"a".as_slice()], files[0].1);
        // Whoever opened it before cannot read what was written since, and is told why.
        let error = read_back(&first, &after).await.unwrap_err();
        assert!(format!("{error:?}").contains("UnknownKey { key: 2 }"), "{error:?}");

        // The former secret opens what it did, until its generation is retired; another one never did.
        let former = Repository::open(store(&cloud), Some(&old)).await.unwrap();
        assert_eq!(read_back(&former, &before).await.unwrap()[b"a".as_slice()], files[0].1);
        let nobodys =
            Repository::open(store(&cloud), Some(&passphrase("a third passphrase"))).await.unwrap_err();
        assert!(
            matches!(nobodys, OpenError::Keys(KeysError::WrongSecret { generation: 2, .. })),
            "{nobodys}"
        );
        assert_eq!(rotated.retire(&store(&cloud), &new).await.unwrap(), 1);
        let gone = Repository::open(store(&cloud), Some(&old)).await.unwrap_err();
        assert!(matches!(gone, OpenError::Keys(KeysError::WrongSecret { generation: 2, .. })), "{gone}");
        Repository::open(store(&cloud), Some(&new)).await.unwrap();
        let mut changed = untouched;
        changed.retain(|name| !cloud.names().contains(name));
        assert!(changed.iter().all(|name| name.starts_with("keys/")), "{changed:?}");
    });
}

#[test]
fn keys_are_not_retired_before_the_new_ones_open() {
    run(async {
        let cloud = Cloud::new(1);
        let secret = Secret::Key([1; 32]);
        let repository = Repository::create(store(&cloud), Some(&secret), cloud.now()).await.unwrap();
        let old = repository.keys().unwrap();
        let new = old.rotate(&store(&cloud), &Secret::Key([2; 32]), false).await.unwrap();
        assert!(new.retire(&store(&cloud), &secret).await.is_err(), "not with the former secret");
        let stale = old.retire(&store(&cloud), &Secret::Key([2; 32])).await.unwrap_err();
        assert!(matches!(stale, KeysError::Rotated { .. }), "{stale}");
        assert_eq!(cloud.names().iter().filter(|name| name.starts_with("keys/")).count(), 2);
        // The newest generation is found although the listing is late.
        cloud.bad(|weather| weather.listing_late = std::time::Duration::from_secs(600));
        let opened = Repository::open(store(&cloud), Some(&Secret::Key([2; 32]))).await.unwrap();
        assert_eq!(opened.keys(), Some(&new));
    });
}

#[test]
fn secrets_are_read_strictly_and_never_printed() {
    assert_eq!(Secret::passphrase("short"), Err(SecretError::BadPassphrase));
    assert_eq!(Secret::passphrase("two lines of\npassphrase"), Err(SecretError::BadPassphrase));
    assert_eq!(Secret::key("abc"), Err(SecretError::BadKey));
    let hex = "07".repeat(32);
    assert_eq!(Secret::key(&format!("{hex}\n")), Ok(Secret::Key([7; 32])));
    let printed = format!("{:?} {:?}", Secret::Key([7; 32]), passphrase("correct horse battery"));
    assert!(!printed.contains('7') && !printed.contains("horse"), "{printed}");
    run(async {
        let repository = encrypted(&Cloud::new(1)).await;
        let printed = format!("{repository:?}");
        let key = repository.keys().unwrap().ring().keys[&1].0;
        assert!(!printed.contains(&format!("{}, {}", key[0], key[1])) && !printed.contains(&to_hex(&key)));
    });
}

#[test]
fn every_changed_byte_of_the_format_and_the_keys_is_noticed() {
    run(async {
        let cloud = Cloud::new(1);
        let secret = Secret::Key([1; 32]);
        Repository::create(store(&cloud), Some(&secret), cloud.now()).await.unwrap();
        for name in cloud.names() {
            let right = cloud.bytes(&name).unwrap();
            for at in 0..right.len() {
                let mut wrong = right.to_vec();
                wrong[at] ^= 1 << (at % 8);
                cloud.damage(&name, wrong);
                assert!(Repository::open(store(&cloud), Some(&secret)).await.is_err(), "{name}: byte {at}");
            }
            cloud.damage(&name, right);
        }
        Repository::open(store(&cloud), Some(&secret)).await.unwrap();
    });
}

#[test]
fn a_newer_format_is_refused_with_what_to_do() {
    run(async {
        let cloud = Cloud::new(1);
        repository(&cloud).await;
        let text = String::from_utf8(cloud.bytes("format").unwrap().to_vec()).unwrap();
        cloud.damage("format", text.replacen("pgherd format 1 ", "pgherd format 2 ", 1));
        let error = Repository::open(store(&cloud), None).await.unwrap_err();
        let OpenError::Read(ReadError::Damaged { damage, .. }) = &error else { panic!("{error:?}") };
        assert_eq!(*damage, Damage::Newer { found: 2 });
        assert!(damage.to_string().contains("written by a newer pgherd"), "{damage}");
    });
}

fn recorded(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join("format-1").join(kind)
}

fn recorded_files() -> Vec<(&'static [u8], Vec<u8>)> {
    let mut random = Random(2026);
    vec![
        (b"PG_VERSION", b"15\n".to_vec()),
        (b"base/1/1259", random.bytes(2 * 8192)),
        (b"base/1/1259_vm", random.bytes(8192)),
        (b"empty", Vec::new()),
        (b"odd \xff\n name", random.bytes(140_000)),
    ]
}

fn recorded_piece() -> Object {
    let content = wal(segment(1, 4), 4)[..9500].to_vec();
    Object::Piece { segment: segment(1, 4), from: 0, content: content.into() }
}

const HISTORY: &[u8] = b"1\t0/380000\tno recovery target specified\n";

/// Bytes that were written by the first version of this format. If this fails, a change has made what people have stored
/// unreadable: give the format another number, and go on reading this one. `PGHERD_UPDATE_GOLDEN=1` writes them anew.
#[test]
fn bytes_of_format_1_are_read() {
    for (kind, secret) in [("plain", None), ("encrypted", Some(passphrase("a passphrase for tests")))] {
        run(async {
            let place = recorded(kind);
            let now = time("2026-11-20T20:54:54Z");
            if std::env::var_os("PGHERD_UPDATE_GOLDEN").is_some() {
                if place.exists() {
                    std::fs::remove_dir_all(&place).unwrap();
                }
                std::fs::create_dir_all(&place).unwrap();
                let store = Store::directory(&place);
                let made = Repository::create_with(store, secret.as_ref(), now, FEW).await.unwrap();
                take(&made, None, &recorded_files(), 3, now).await;
                archive(&made).put_history(Timeline(2), HISTORY).await.unwrap();
                archive(&made).put_partial(segment(1, 4), &wal(segment(1, 4), 4)[..9000]).await.unwrap();
                archive(&made).put(&recorded_piece()).await.unwrap();
                for empty in ["probe", ".incoming"] {
                    std::fs::remove_dir(place.join(empty)).unwrap();
                }
            }
            let opened = Repository::open(Store::directory(&place), secret.as_ref()).await.unwrap();
            assert_eq!(opened.format().created, now);
            let id = "20261120T205454".parse().unwrap();
            let Some(Outcome::Committed(manifest)) = manifest::outcome(&opened, PLACE, id).await.unwrap()
            else {
                panic!("the backup is not there");
            };
            let expected =
                recorded_files().into_iter().map(|(path, content)| (path.to_vec(), content)).collect();
            assert_eq!(read_back(&opened, &manifest).await.unwrap(), expected);
            let archive = archive(&opened);
            assert_eq!(archive.segment(segment(1, 3)).await.unwrap(), wal(segment(1, 3), 3));
            let Fetched::Beginning { content, .. } = archive.fetch(segment(1, 4)).await.unwrap() else {
                panic!()
            };
            assert_eq!(content[..9500], wal(segment(1, 4), 4)[..9500]);
            assert_eq!(archive.history(Timeline(2)).await.unwrap().forks().len(), 1);
            archive.prove(Timeline(1), manifest.start, manifest.stop).await.unwrap();
        });
    }
}
