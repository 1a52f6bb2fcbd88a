//! What a restore refuses, deletes and leaves, in directories made by hand.

use super::*;

fn control_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    let mut four = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    for (at, value) in [(0, 7), (8, 1300), (12, 202_209_061), (16, 6), (40, 0x2000), (48, 1), (216, 8192)] {
        four(at, value);
    }
    for (at, value) in [(220, 131_072), (224, 8192), (228, 16 << 20)] {
        four(at, value);
    }
    bytes[32..40].copy_from_slice(&0x2028_u64.to_le_bytes());
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes[..288]) as u32;
    bytes[288..292].copy_from_slice(&crc.to_le_bytes());
    bytes
}

const CLUSTER: SystemId = SystemId(7);

fn ending() -> Ending {
    Ending {
        control: control_bytes(),
        backup_label: b"START WAL LOCATION: 0/2028\n".to_vec(),
        tablespace_map: Vec::new(),
        recovery: Recovery {
            restore_command: "false".to_owned(),
            end: End::Latest,
            timeline: FollowTimeline::Latest,
            action: Action::Pause,
            come: Come::Standby,
        },
        at_least: ControlFile::parse(&control_bytes()).unwrap().limits,
    }
}

fn target(dir: &Path) -> Target {
    Target { data_dir: dir.join("data"), wal_dir: None, tablespaces: Vec::new() }
}

/// A backup of a few files, one of them in each tablespace.
fn write(target: &Target, over: Over, content: &[u8]) -> Result<Restored, RestoringError> {
    let mut restoring = Restoring::begin(target.clone(), over, CLUSTER, 15, "backup 1")?;
    let put = |restoring: &mut Restoring, path: &str| -> Result<(), RestoringError> {
        let Admitted::Write(writing) = restoring.file(path.as_bytes(), 0o640, content.len() as u64)? else {
            return Ok(());
        };
        let mut written = writing.open()?;
        written.write(content, 0)?;
        Ok(written.finish()?)
    };
    put(&mut restoring, "PG_VERSION")?;
    restoring.directory(b"base", 0o700)?;
    put(&mut restoring, "base/1")?;
    restoring.directory(b"global", 0o700)?;
    put(&mut restoring, "global/pg_control")?;
    restoring.directory(b"pg_tblspc", 0o700)?;
    for space in target.tablespaces.clone() {
        let link = link_path(&space);
        restoring.symlink(link.as_bytes(), b"whatever it was")?;
        restoring.directory(format!("{link}/PG_15_1").as_bytes(), 0o700)?;
        put(&mut restoring, &format!("{link}/PG_15_1/2"))?;
    }
    restoring.directory(b"pg_wal", 0o700)?;
    restoring.finish(&ending())
}

#[test]
fn nothing_starts_before_the_end_and_nothing_without_a_label_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let target = target(dir.path());
    let restoring = Restoring::begin(target.clone(), Over::Nothing, CLUSTER, 15, "backup 1").unwrap();
    assert!(target.data_dir.join(MARKER).exists());
    let second = Restoring::begin(target.clone(), Over::Delta, CLUSTER, 15, "backup 2");
    assert!(matches!(second, Err(RestoringError::Busy { .. })), "{second:?}");
    drop(restoring);
    let again = look(&target, Over::Nothing, CLUSTER, 15);
    assert!(matches!(again, Err(RestoringError::Interrupted { .. })), "{again:?}");
    assert_eq!(look(&target, Over::Delta, CLUSTER, 15).unwrap(), Standing::Interrupted);

    write(&target, Over::Delta, b"content").unwrap();
    assert!(!target.data_dir.join(MARKER).exists());
    assert!(target.data_dir.join("standby.signal").exists());
    let control = ControlFile::read(&target.data_dir.join("global/pg_control")).unwrap();
    assert_eq!((control.checkpoint.0, control.checkpoint_redo.0), (0xDEAD, 0x2000));
    assert_eq!(fs::read(target.data_dir.join("backup_label")).unwrap(), b"START WAL LOCATION: 0/2028\n");
    assert!(!target.data_dir.join("tablespace_map").exists(), "an empty one is none");
}

#[test]
fn what_is_not_empty_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = target(dir.path());
    fs::create_dir(&target.data_dir).unwrap();
    fs::write(target.data_dir.join("thesis.txt"), "years of work").unwrap();
    let refused = write(&target, Over::Nothing, b"x");
    assert!(matches!(refused, Err(RestoringError::NotEmpty { .. })), "{refused:?}");
    let refused = write(&target, Over::Delta, b"x");
    assert!(matches!(refused, Err(RestoringError::NotADataDirectory { .. })), "{refused:?}");
    assert_eq!(names(&target.data_dir).unwrap(), [b"thesis.txt"]);

    target.data_dir = dir.path().join("other");
    for (place, why) in [("rel", "not absolute"), (target.data_dir.to_str().unwrap(), "something else")] {
        target.wal_dir = Some(place.into());
        let refused = look(&target, Over::Nothing, CLUSTER, 15).unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}");
    }
    target.wal_dir = Some(dir.path().join("data"));
    let refused = look(&target, Over::Nothing, CLUSTER, 15);
    assert!(matches!(refused, Err(RestoringError::NotEmpty { .. })), "{refused:?}");
}

#[test]
fn case_25_over_another_cluster_nothing_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let target = target(dir.path());
    write(&target, Over::Nothing, b"content").unwrap();
    let refused = look(&target, Over::Delta, SystemId(8), 15);
    assert!(matches!(refused, Err(RestoringError::OtherCluster { .. })), "{refused:?}");
}

#[test]
fn case_25_what_does_not_belong_is_deleted_and_what_links_lead_to_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = target(dir.path());
    let space = Tablespace { oid: 16385, was: "/original".into(), place: dir.path().join("space") };
    target.tablespaces = vec![space.clone()];
    write(&target, Over::Nothing, b"long content").unwrap();

    let data = &target.data_dir;
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("PG_15_1/9")).unwrap();
    fs::create_dir_all(data.join("base/7/8")).unwrap();
    fs::create_dir_all(space.place.join("PG_14_1")).unwrap();
    fs::write(data.join("base/7/8/9"), "dropped since").unwrap();
    fs::write(data.join("pg_wal/000000010000000000000007"), "another history").unwrap();
    fs::write(data.join("postmaster.pid"), "crashed").unwrap();
    fs::write(space.place.join("PG_15_1/99"), "dropped since").unwrap();
    symlink(&elsewhere, data.join("pg_tblspc/16386")).unwrap();
    symlink(&elsewhere, data.join("log")).unwrap();
    fs::remove_file(data.join("base/1")).unwrap();
    symlink(dir.path().join("victim"), data.join("base/1")).unwrap();
    fs::write(dir.path().join("victim"), "somebody's").unwrap();

    let restored = write(&target, Over::Delta, b"content").unwrap();
    assert!(restored.deleted >= 6, "{restored:?}");
    assert_eq!(fs::read(data.join("base/1")).unwrap(), b"content");
    assert_eq!(fs::read(dir.path().join("victim")).unwrap(), b"somebody's", "written through a link");
    assert_eq!(fs::read(space.place.join("PG_15_1/2")).unwrap(), b"content");
    assert_eq!(fs::read_link(data.join("pg_tblspc/16385")).unwrap(), space.place);
    assert!(elsewhere.join("PG_15_1/9").exists() && space.place.join("PG_14_1").exists());
    for gone in ["base/7", "pg_wal/000000010000000000000007", "postmaster.pid", "pg_tblspc/16386", "log"] {
        assert!(!data.join(gone).exists() && !data.join(gone).is_symlink(), "{gone}");
    }
    assert!(!space.place.join("PG_15_1/99").exists());
}

#[test]
fn wal_elsewhere_is_emptied_and_linked() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = target(dir.path());
    target.wal_dir = Some(dir.path().join("wal"));
    write(&target, Over::Nothing, b"content").unwrap();
    assert_eq!(fs::read_link(target.data_dir.join("pg_wal")).unwrap(), dir.path().join("wal"));
    fs::write(dir.path().join("wal/000000010000000000000007"), "another history").unwrap();
    // Where it leads is not said again.
    target.wal_dir = None;
    write(&target, Over::Delta, b"content").unwrap();
    assert!(target.data_dir.join("pg_wal").is_symlink());
    assert!(names(&dir.path().join("wal")).unwrap().is_empty());
}

#[test]
fn a_backup_that_leads_out_of_its_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = target(dir.path());
    let mut restoring = Restoring::begin(target, Over::Nothing, CLUSTER, 15, "backup 1").unwrap();
    restoring.symlink(b"log", b"/somewhere").unwrap();
    for refused in [
        restoring.file(b"log/authorized_keys", 0o600, 1).err(),
        restoring.symlink(b"pg_xact/0000", b"/somewhere").err(),
        restoring.symlink(b"pg_tblspc/16385", b"/somewhere").err(),
    ] {
        assert!(matches!(refused, Some(RestoringError::Entry { .. })), "{refused:?}");
    }
}

#[test]
fn the_map_of_tablespaces_is_changed_where_they_have_moved_and_nowhere_else() {
    let space = |oid, place: &str| Tablespace { oid, was: format!("/was/{oid}").into(), place: place.into() };
    let map = b"1 /was/1\n2 /was/a\\\nb\n3 /was/3\n";
    assert_eq!(moved(map, &[space(1, "/was/1"), space(3, "/was/3")]), map);
    assert_eq!(moved(map, &[space(2, "/new\\2")]), b"1 /was/1\n2 /new\\\\2\n3 /was/3\n");
}

/// Opens a file of this size as a restore does.
fn opened(dir: &Path, size: u64) -> Written {
    let _alone = Arc::new(File::open(dir).unwrap());
    Writing { place: dir.join("1"), mode: 0o600, size, _alone }.open().unwrap()
}

/// Whether the file system goes past its cache when asked as one usually asks.
fn can_be_direct(dir: &Path) -> bool {
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(dir.join("0")).is_ok()
}

fn is_direct(written: &Written) -> bool {
    rustix::fs::fcntl_getfl(&written.file).unwrap().contains(rustix::fs::OFlags::DIRECT)
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn what_comes_in_pieces_is_the_file_past_the_cache_or_not(
        pieces in proptest::collection::vec(0..3 * GATHERED_BYTES / 2, 0..6),
        jump in proptest::option::of(0..6_usize),
        is_refused in proptest::bool::ANY,
    ) {
        // Beside the program: where tests have their temporary files, direct writes may not be possible.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let size: usize = pieces.iter().sum();
        let content: Vec<u8> = (0..size).map(|at| (at / 7 + at / 4096) as u8).collect();
        let mut written = opened(dir.path(), size as u64);
        proptest::prop_assert_eq!(is_direct(&written), size >= GATHERED_BYTES && can_be_direct(dir.path()));
        if is_refused && let Some(gathered) = &mut written.gathered {
            gathered.misalign();
        }
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for bytes in &pieces {
            parts.push((parts.last().map_or(0, |(at, bytes)| at + bytes), *bytes));
        }
        // As when a file turns out to be written in another order.
        if let Some(last) = jump.filter(|last| *last < parts.len()) {
            let part = parts.remove(last);
            parts.push(part);
        }
        for (at, bytes) in parts {
            written.write(&content[at..at + bytes], at as u64).unwrap();
        }
        written.finish().unwrap();
        proptest::prop_assert!(fs::read(dir.path().join("1")).unwrap() == content);
    }
}

#[test]
fn a_file_that_had_something_is_written_through_the_cache() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    fs::write(dir.path().join("1"), "before").unwrap();
    assert!(!is_direct(&opened(dir.path(), 2 * GATHERED_BYTES as u64)));
}

#[test]
fn a_file_that_is_short_of_its_size_is_damaged_past_the_cache_too() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let mut written = opened(dir.path(), 2 * GATHERED_BYTES as u64);
    written.write(&vec![1; 2 * GATHERED_BYTES - 1], 0).unwrap();
    let refused = written.finish().unwrap_err().to_string();
    assert!(refused.contains("it has 2097151 bytes and should have 2097152"), "{refused}");
}
