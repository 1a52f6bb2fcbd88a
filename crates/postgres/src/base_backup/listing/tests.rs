//! What belongs into a backup, in which order, in directories made by hand.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

fn rules() -> Rules {
    Rules { version_dir: b"PG_15_202209061".to_vec(), file_pages: 131_072 }
}

fn listed(dir: &Path) -> Vec<Found> {
    Listing::new(dir, Some(rules())).map(|found| found.unwrap()).collect()
}

fn paths(dir: &Path) -> Vec<String> {
    let path = |found: Found| String::from_utf8_lossy(&found.path).into_owned();
    listed(dir).into_iter().map(path).collect()
}

fn fill(dir: &Path, files: &[&str]) {
    for file in files {
        let path = dir.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file).unwrap();
    }
}

#[test]
fn contents_that_postgresql_makes_anew_stay_out_and_their_directories_do_not() {
    let dir = tempfile::tempdir().unwrap();
    fill(
        dir.path(),
        &[
            "PG_VERSION",
            "pg_wal/000000010000000000000001",
            "pg_replslot/a/state",
            "pg_stat_tmp/x",
            "pg_xact/0000",
            "postmaster.pid",
            "standby.signal",
            "backup_label",
            "base/1/1259",
            "base/1/pg_internal.init.77",
            "base/pgsql_tmp/pgsql_tmp1.0",
            "global/pg_control",
            "global/pg_internal.init",
            "pg_twophase/00000001",
            ".pgherd.conf.tmp",
            "postgresql.conf",
            "log/postmaster.pid",
        ],
    );
    assert_eq!(
        paths(dir.path()),
        [
            "PG_VERSION",
            "base",
            "base/1",
            "base/1/1259",
            "global",
            "global/pg_control",
            "log",
            "log/postmaster.pid",
            "pg_replslot",
            "pg_stat_tmp",
            "pg_twophase",
            "pg_twophase/00000001",
            "pg_wal",
            "pg_xact",
            "pg_xact/0000",
            "postgresql.conf",
        ]
    );
    let control = listed(dir.path()).into_iter().find(|found| found.path == CONTROL).unwrap();
    assert_eq!(control.kind, Kind::File(Content::Control));
}

#[test]
fn case_16_unlogged_and_temporary_relations_stay_out_but_for_what_they_are_made_from() {
    let dir = tempfile::tempdir().unwrap();
    fill(
        dir.path(),
        &[
            "base/5/100",
            "base/5/100_init",
            "base/5/100_fsm",
            "base/5/100.1",
            "base/5/100_vm.1",
            "base/5/101",
            "base/5/1000",
            "base/5/t3_102",
            "base/5/t3_102_fsm",
            "base/5/t3_102.1",
            "base/5/ten_notes",
            "pg_tblspc/200/PG_15_202209061/5/100",
            "pg_tblspc/200/PG_15_202209061/5/100_init",
            "pg_tblspc/200/PG_15_202209061/5/t1_7",
            "other/100",
            "other/100_init",
            "other/t3_102",
        ],
    );
    assert_eq!(
        paths(dir.path()),
        [
            "base",
            "base/5",
            "base/5/1000",
            "base/5/100_init",
            "base/5/101",
            "base/5/ten_notes",
            "other",
            "other/100",
            "other/100_init",
            "other/t3_102",
            "pg_tblspc",
            "pg_tblspc/200",
            "pg_tblspc/200/PG_15_202209061",
            "pg_tblspc/200/PG_15_202209061/5",
            "pg_tblspc/200/PG_15_202209061/5/100_init",
        ]
    );
}

#[test]
fn case_16_a_tablespace_is_its_link_and_this_versions_directory() {
    let (dir, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(place.path(), &["PG_15_202209061/5/300.2", "PG_14_202107181/5/300", "thesis.txt"]);
    fs::create_dir(dir.path().join("pg_tblspc")).unwrap();
    symlink(place.path(), dir.path().join("pg_tblspc/16385")).unwrap();
    let found = listed(dir.path());
    assert_eq!(found.len(), 5);
    assert_eq!(found[1].kind, Kind::Symlink(place.path().as_os_str().as_bytes().to_vec()));
    assert_eq!(found[4].path, b"pg_tblspc/16385/PG_15_202209061/5/300.2");
    assert_eq!(found[4].kind, Kind::File(Content::Pages { first_block: 262_144 }));
}

#[test]
fn a_link_among_postgresqls_files_is_not_passed_over() {
    let (dir, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(place.path(), &["wal/x", "postgresql.conf", "log/y", "5/1"]);
    fs::create_dir(dir.path().join("base")).unwrap();
    for (from, to) in [("pg_wal", "wal"), ("postgresql.conf", "postgresql.conf"), ("log", "log")] {
        symlink(place.path().join(to), dir.path().join(from)).unwrap();
    }
    let kinds: Vec<Kind> = listed(dir.path()).into_iter().map(|found| found.kind).collect();
    let log = place.path().join("log").into_os_string().into_vec();
    let file = Kind::File(Content::Other);
    assert_eq!(
        kinds,
        [Kind::Directory, Kind::Symlink(log), Kind::Directory, file],
        "base, log, pg_wal, conf"
    );

    symlink(place.path().join("5"), dir.path().join("base/5")).unwrap();
    let refused = Listing::new(dir.path(), Some(rules())).find_map(Result::err);
    assert!(matches!(refused, Some(BaseBackupError::Link { .. })), "{refused:?}");
}

#[test]
fn names_of_relations() {
    let parse = |name: &str| {
        RelationFile::parse(name.as_bytes())
            .map(|file| (file.number, file.fork, file.segment, file.temporary))
    };
    assert_eq!(parse("16384"), Some((16384, Fork::Main, 0, false)));
    assert_eq!(parse("16384_fsm.12"), Some((16384, Fork::FreeSpace, 12, false)));
    assert_eq!(parse("t12_16384_vm"), Some((16384, Fork::Visibility, 0, true)));
    for other in
        ["", "pg_filenode.map", "16384_", "16384.", "16384_old", "t_1", "t1", "16384.1.2", "12345678901"]
    {
        assert_eq!(parse(other), None, "{other}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn case_16_any_names_come_in_order_of_their_bytes(
        names in proptest::collection::btree_set("[a-c\u{1}-\u{5}.~-]{1,3}(/[a-c.0~-]{1,3}){0,2}", 1..12)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut made = Vec::new();
        for name in names {
            if name.split('/').any(|part| part == "." || part == "..") {
                continue;
            }
            let mut path = dir.path().as_os_str().as_bytes().to_vec();
            path.push(b'/');
            // Not UTF-8.
            path.extend(name.bytes().map(|byte| if byte == b'~' { 0xFF } else { byte }));
            let path = PathBuf::from(std::ffi::OsString::from_vec(path));
            // A file may stand where a directory is wanted.
            if fs::create_dir_all(path.parent().unwrap()).is_ok() && fs::write(&path, "x").is_ok() {
                made.push(path);
            }
        }
        let found = listed(dir.path());
        prop_assert!(found.is_sorted_by(|one, next| one.path < next.path), "{found:?}");
        for path in made {
            let path = path.strip_prefix(dir.path()).unwrap().as_os_str().as_bytes();
            let name = path.rsplit(|byte| *byte == b'/').next().unwrap();
            let left_out = !path.contains(&b'/') && name.starts_with(b".") && name.ends_with(b".tmp");
            prop_assert!(left_out || found.iter().any(|found| found.path == path));
        }
    }
}
