//! A restore over what is there, after it was interrupted, after something else was done to it, and without what it needs.

use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;

use pgherd_agent::backups::Progress;
use pgherd_agent::backups::restore::{RestoreError, Wish, plan, restore};
use pgherd_postgres::restoring::{End, Over, RestoringError, Standing};
use tokio::sync::watch;

use crate::harness::{story, until};
use crate::original::{Original, digest, files_of};
use crate::restored::{Copy, at};

story! {
    async fn case_25_an_interrupted_restore_starts_nowhere_and_is_gone_on_with() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "3", "-q"]).await;
        let manifest = original.full().await.manifest;
        let (wanted, end) = (original.digest().await, original.archive_everything().await);
        let archive = original.archive_as_files().await;
        let copy = Copy::of(&original, "r").await;
        let wish = copy.wish(&archive, at(end));
        let delta = Wish { over: Over::Delta, ..wish.clone() };

        for part in 1..4u64 {
            let wish = if part == 1 { &wish } else { &delta };
            let planned = plan(&original.repository, &manifest, wish.clone()).await.unwrap();
            assert_eq!(planned.standing, if part == 1 { Standing::Empty } else { Standing::Interrupted });
            let slow = NonZeroU64::new(40_000_000);
            until("the one before has ended, and this one has come some way", async || {
                let progress = watch::Sender::new(Progress::default());
                let mut seen = progress.subscribe();
                let work = restore(&original.repository, planned.clone(), 2, slow, &progress);
                // Files count when they are whole. The last of them is half of everything, so this is far from the end.
                tokio::select! {
                    biased;
                    done = work => match done {
                        Err(RestoreError::Target(RestoringError::Busy { .. })) => None,
                        done => panic!("{done:?}"),
                    },
                    _ = seen.wait_for(|seen| seen.done_bytes > part * 5_000_000) => Some(()),
                }
            })
            .await;
            assert!(!copy.start().status.success(), "half a data directory came up");
        }
        let refused = plan(&original.repository, &manifest, wish).await.unwrap_err();
        assert!(matches!(refused, RestoreError::Target(RestoringError::Interrupted { .. })), "{refused:?}");

        let (planned, report) = until("the one before has ended", async || {
            match copy.restore(&original, &manifest, delta.clone()).await {
                Err(RestoreError::Target(RestoringError::Busy { .. })) => None,
                other => Some(other.unwrap()),
            }
        })
        .await;
        assert!(report.fetched_bytes < report.bytes, "{report:?}");
        assert!(planned.volumes.iter().map(|volume| volume.needed_bytes).sum::<u64>() < report.bytes);
        let restored = files_of(&copy.instance.data_dir);
        assert_eq!(digest(&copy.recover().await).await, wanted);

        // It runs now, and is not written over.
        let refused = plan(&original.repository, &manifest, delta.clone()).await.unwrap_err();
        assert!(matches!(refused, RestoreError::Target(RestoringError::Running { .. })), "{refused:?}");
        copy.stop();

        // It has gone its own way, and comes back.
        let data = &copy.instance.data_dir;
        std::fs::write(data.join("base/1/99999"), "of another history").unwrap();
        let largest = restored.iter().max_by_key(|(_, content)| content.len()).unwrap().0;
        std::fs::File::options().write(true).open(data.join(largest)).unwrap().write_at(b"rot", 77_777).unwrap();
        std::fs::remove_file(data.join("PG_VERSION")).unwrap();
        let refused = plan(&original.repository, &manifest, delta.clone()).await.unwrap_err();
        assert!(matches!(refused, RestoreError::Target(RestoringError::NotADataDirectory { .. })), "{refused:?}");
        std::fs::write(data.join("PG_VERSION"), "").unwrap();
        let (_, report) = copy.restore(&original, &manifest, delta).await.unwrap();
        eprintln!("a delta fetched {} of {} bytes", report.fetched_bytes, report.bytes);
        assert!(report.fetched_bytes < report.bytes / 2 && report.restored.deleted > 0, "{report:?}");
        let again = files_of(data);
        let differ: Vec<_> = restored.iter().filter(|(path, content)| again.get(*path) != Some(*content)).collect();
        assert!(differ.is_empty(), "{:?}", differ.iter().map(|(path, _)| path).collect::<Vec<_>>());
        assert_eq!(again.len(), restored.len());
        assert_eq!(digest(&copy.recover().await).await, wanted);
        copy.stop();
    }
}

story! {
    async fn case_27_without_its_label_a_restored_copy_does_not_start() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        let manifest = original.full().await.manifest;
        let end = original.archive_everything().await;
        let archive = original.archive_as_files().await;
        let copy = Copy::of(&original, "r").await;
        copy.restore(&original, &manifest, copy.wish(&archive, at(end))).await.unwrap();
        let data = &copy.instance.data_dir;
        for without in ["recovery.signal", "postmaster.opts"] {
            // With the signal, and without it.
            std::fs::rename(data.join("backup_label"), data.join("backup_label.aside")).unwrap();
            assert!(!copy.start().status.success(), "it came up without a label");
            assert!(copy.log().contains("checkpoint record"), "{}", copy.log());
            std::fs::rename(data.join("backup_label.aside"), data.join("backup_label")).unwrap();
            std::fs::rename(data.join(without), data.join("aside")).ok();
        }
        std::fs::write(data.join("recovery.signal"), "").unwrap();
        copy.recover().await;
        copy.stop();
    }
}

story! {
    async fn a_damaged_pack_ends_a_restore_and_nothing_starts() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        let manifest = original.full().await.manifest;
        let packs = original.herd.path().join("repository/cluster");
        let pack = files_of(&packs).into_iter().find(|(path, _)| path.to_string_lossy().contains("/packs/")).unwrap();
        let mut content = pack.1.clone();
        for byte in content.iter_mut().skip(1000).step_by(100_000) {
            *byte ^= 1;
        }
        let path = packs.join(&pack.0);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, mode).unwrap();
        std::fs::write(&path, content).unwrap();
        let copy = Copy::of(&original, "r").await;
        let wish = copy.wish(original.herd.path(), End::Immediate);
        let refused = copy.restore(&original, &manifest, wish).await.unwrap_err();
        assert!(matches!(refused, RestoreError::Read(_)), "{refused:?}");
        assert!(!copy.start().status.success());
    }
}
