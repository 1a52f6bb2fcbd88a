//! Backups of a repository are shown, kept, deleted, taken back, let go by a policy, and read back.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::repository::{Scene, program, story, wait};
use crate::server::sql;

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn statuses(scene: &Scene) -> Vec<String> {
    let listed = scene.json(&["backup", "list"]);
    let backups = listed["backups"].as_array().unwrap().iter();
    backups.map(|backup| text(&backup["status"]).to_owned()).collect()
}

#[test]
fn as_root_backups_are_listed_kept_deleted_taken_back_and_let_go() {
    story("backups::as_root_backups_are_listed_kept_deleted_taken_back_and_let_go", || {
        let scene = Scene::new();
        let taken: Vec<Value> = (0..3).map(|_| scene.back_up(&[])).collect();
        let [first, second, third] = [0, 1, 2].map(|at| text(&taken[at]["id"]).to_owned());
        let begun = jiff::Timestamp::now();
        scene.write(1);
        let ended = jiff::Timestamp::now();
        scene.archive_everything();
        let listed = scene.json(&["backup", "list"]);
        let window = &listed["recovery_window"];
        assert_eq!([&window["from"], &window["from_backup"]], [&taken[0]["end_time"], &taken[0]["id"]]);
        let to: jiff::Timestamp = text(&window["to"]).parse().unwrap();
        assert!(begun <= to && to <= ended, "{begun} {to} {ended}");
        let table = scene.told(&["backup", "list"]);
        assert_eq!(table.lines().count(), 4, "{table}");
        let mut shown = taken[2].clone();
        shown["can_be_restored"] = true.into();
        assert_eq!(scene.json(&["backup", "show", "last"]), shown);
        let told = scene.told(&["backup", "show", &second]);
        assert!(told.contains("begin WAL") && told.contains(text(&taken[1]["begin_wal"])), "{told}");

        // Monitoring.
        let (exit, report) = check(&scene, &[]);
        assert!(exit == 0, "{report}");
        for (options, item) in [
            (&["--minimum-redundancy", "4"][..], "minimum redundancy requirements"),
            (&["--backup-maximum-age", "0s"], "backup maximum age"),
            (&["--backup-minimum-size", "100000000000"], "backup minimum size"),
            (&["--wal-maximum-age", "0s"], "wal maximum age"),
        ] {
            let (exit, report) = check(&scene, options);
            let bad: Vec<&Value> =
                report["checks"].as_array().unwrap().iter().filter(|check| check["state"] != 0).collect();
            assert!(exit == 2 && bad.len() == 1 && bad[0]["check"] == item, "{options:?}: {exit} {report}");
        }
        fs::rename(scene.at("objects"), scene.at("unmounted")).unwrap();
        assert_eq!(check(&scene, &[]).0, 3, "nobody knows");
        fs::rename(scene.at("unmounted"), scene.at("objects")).unwrap();

        // The first one is kept, the second one goes.
        scene.told(&["backup", "keep", &first, "--standalone"]);
        let policy = ["backup", "expire", "--retention", "REDUNDANCY 1"];
        let preview = scene.json(&[&policy[..], &["--dry-run"]].concat());
        let verdicts = preview["verdicts"].as_array().unwrap();
        let labels: Vec<&str> = verdicts.iter().map(|verdict| text(&verdict["label"])).collect();
        assert_eq!(labels, ["VALID", "OBSOLETE", "KEEP:STANDALONE"], "{preview}");
        assert_eq!([&verdicts[1]["goes"], &verdicts[2]["wal"]], [&Value::from(true), &Value::from("own")]);
        assert_eq!(statuses(&scene), ["DONE"; 3], "a preview touches nothing");
        let (exit, said) = scene.refused(&policy);
        assert!(exit == 2 && said.contains("--yes"), "nobody is there to be asked: {said}");
        let done = scene.json(&[&policy[..], &["--yes"]].concat());
        assert_eq!(done["collected"]["waiting"][0], Value::from(second.clone()), "{done}");
        assert_eq!(statuses(&scene), ["DONE", "DELETED", "DONE"]);
        let (exit, said) = scene.refused(&["restore", "--to", &scene.at("copy"), "--backup", &second]);
        assert!(exit == 1 && said.contains(&format!("pgherd backup undelete {second}")), "{said}");
        scene.told(&["backup", "undelete", &second]);
        assert_eq!(statuses(&scene), ["DONE"; 3]);

        // By hand: not what is kept, and not the last one.
        let delete = |id: &str| scene.refused(&["backup", "delete", id, "--yes"]);
        let (exit, said) = delete(&first);
        assert!(exit == 3 && said.contains("kept by hand") && said.contains("--release"), "{said}");
        scene.told(&["backup", "keep", &first, "--release"]);
        let (exit, said) = scene.refused(&["backup", "keep", &first, "--release"]);
        assert!(exit == 3 && said.contains("is not kept"), "{said}");
        scene.told(&["backup", "delete", &first, "--yes"]);
        scene.told(&["backup", "delete", &third, "--yes"]);
        let (exit, said) = delete(&second);
        assert!(exit == 3 && said.contains("minimum_redundancy is 1"), "{said}");
        scene.told(&["backup", "delete", &second, "--yes", "--minimum-redundancy", "0"]);
        assert_eq!(statuses(&scene), ["DELETED"; 3]);

        for (arguments, code, words) in [
            (&["backup", "keep", "last", "--until", "2020-01-01 00:00+00"][..], 1, "there is no backup that"),
            (&["backup", "keep", &first], 1, "is deleted"),
            (&["backup", "undelete", "20010101T000000"], 1, "there is no backup 20010101T000000"),
            (&["backup", "expire", "--retention", "FOREVER"], 2, "RECOVERY WINDOW OF 7 DAYS"),
            (&["backup", "expire", "--retention", "REDUNDANCY 1", "--grace", "1s"], 2, "10 minutes at least"),
            (&["backup", "delete", "x", "--json"], 2, "--json means nothing"),
        ] {
            let (exit, said) = scene.refused(arguments);
            assert!(exit == code && said.contains(words), "{arguments:?}: {exit} {said}");
        }
        scene.told(&["backup", "undelete", &third]);
        let (exit, said) = scene.refused(&["backup", "keep", "last", "--until", "2020-01-01 00:00+00"]);
        assert!(exit == 2 && said.contains("is over"), "{said}");
        scene.told(&["backup", "keep", "last", "--until", "2099-01-01 00:00+00"]);
        assert_eq!(scene.json(&["backup", "show", "last"])["keep"]["until"], "2099-01-01T00:00:00Z");
    });
}

#[test]
fn as_root_a_backup_whose_writer_is_killed_is_none_and_the_next_one_is_whole() {
    story("backups::as_root_a_backup_whose_writer_is_killed_is_none_and_the_next_one_is_whole", || {
        let scene = Scene::new();
        sql(&scene.server, "CREATE TABLE filler AS SELECT n, md5(n::text) FROM generate_series(1, 300000) n");
        let data_dir = scene.server.data_dir().display().to_string();
        let mut taking = program()
            .args(["backup", "create", "--fast", "--max-rate", "4", "--data-dir", &data_dir])
            .args(["--repository", &scene.repository])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = || fs::exists(scene.at("objects/cluster")).unwrap() && !packs(&scene).is_empty();
        wait("it has stored something", || {
            assert!(taking.try_wait().unwrap().is_none(), "it was too fast to be killed");
            begun()
        });
        taking.kill().unwrap();
        taking.wait().unwrap();
        assert_eq!(statuses(&scene), ["STARTED"]);
        let (_, said) = scene.refused(&["restore", "--to", &scene.at("copy")]);
        assert!(said.contains("there is no base backup"), "{said}");
        let open = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgherd'";
        wait("the server knows of no backup", || sql(&scene.server, open) == "0");
        let next = scene.back_up(&[]);
        assert_eq!(next["mode"], "full", "what was not completed is nobody's parent");
        assert_eq!(statuses(&scene), ["STARTED", "DONE"]);
        scene.told(&["backup", "verify"]);
    });
}

#[test]
fn as_root_what_is_damaged_is_told_by_file_and_object() {
    story("backups::as_root_what_is_damaged_is_told_by_file_and_object", || {
        let scene = Scene::new();
        let backup = scene.back_up(&[]);
        scene.write(1);
        scene.archive_everything();
        let sound = scene.json(&["backup", "verify"]);
        assert_eq!(sound["backups"][0]["files"], backup["files"]);
        assert_eq!(sound["backups"][0]["bytes"], backup["size_bytes"]);
        assert!(sound["wal"]["segments"].as_u64() > Some(1), "{sound}");
        assert_eq!(
            scene.json(&["backup", "verify", "--stored"]),
            sound,
            "what is stored says the same of it"
        );

        let segment =
            PathBuf::from(scene.at("objects")).join("cluster").join(system(&scene)).join("wal/00000001");
        let segment = segment.join(text(&backup["begin_wal"]));
        change(&segment);
        let pack = packs(&scene).remove(0);
        change(&pack);
        assert_eq!(check(&scene, &[]).0, 0, "it looks at names only");
        for arguments in
            [&["backup", "verify"][..], &["backup", "verify", "last"], &["backup", "verify", "--stored"]]
        {
            let output = scene.call(&[arguments, &["--json"]].concat());
            assert_eq!(output.status.code(), Some(1));
            let told: Value = serde_json::from_slice(&output.stdout).unwrap();
            let damaged = told["backups"][0]["damaged"].as_array().unwrap();
            assert!(!damaged.is_empty(), "{told}");
            for damage in damaged {
                assert!(text(&damage["what"]).contains("/packs/"), "{damage}");
                assert!(scene.server.data_dir().join(text(&damage["file"])).exists(), "{damage}");
            }
            let read = told["backups"][0]["files"].as_u64().unwrap() + damaged.len() as u64;
            assert_eq!(
                Some(read),
                backup["files"].as_u64(),
                "the others were read all the same: {arguments:?}"
            );
            assert_eq!(told["wal"]["damaged"][0]["file"], backup["begin_wal"]);
        }
        let (_, said) = scene.refused(&["backup", "verify"]);
        assert!(said.contains("not everything can be read back") && said.contains("hint"), "{said}");

        // What is not there any more is noticed at once.
        fs::remove_file(&pack).unwrap();
        fs::remove_file(&segment).unwrap();
        let (exit, report) = check(&scene, &[]);
        let critical = report["checks"].as_array().unwrap().iter().filter(|check| check["state"] == 2);
        let critical: Vec<&str> = critical.map(|check| text(&check["check"])).collect();
        assert!(
            exit == 2 && critical.contains(&"objects") && critical.contains(&"backup validity"),
            "{report}"
        );
    });
}

/// What monitoring is told, with the exit code.
fn check(scene: &Scene, options: &[&str]) -> (i32, Value) {
    let output = scene.call(&[&["backup", "check", "--json"], options].concat());
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap())
}

fn system(scene: &Scene) -> String {
    sql(&scene.server, "SELECT system_identifier FROM pg_control_system()")
}

fn packs(scene: &Scene) -> Vec<PathBuf> {
    let place = PathBuf::from(scene.at("objects")).join("cluster").join(system(scene)).join("packs");
    let listed = |dir: &Path| -> Vec<PathBuf> {
        fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    };
    listed(&place).iter().flat_map(|backup| listed(backup)).collect()
}

/// Some bytes of an object rot.
fn change(object: &Path) {
    let mut content = fs::read(object).unwrap();
    content.iter_mut().skip(1000).step_by(100_000).for_each(|byte| *byte ^= 1);
    fs::set_permissions(object, PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(object, content).unwrap();
}
