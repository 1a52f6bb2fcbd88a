//! What a plan of `pgherd restore` names is what is there when PostgreSQL has recovered.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;

use crate::repository::{Scene, program, said, story, wait, write};
use crate::server::{Server, programs, sql};

fn last_of(server: &Server) -> u64 {
    sql(server, "SELECT xid FROM ledger ORDER BY n DESC LIMIT 1").parse().unwrap()
}

/// Recovers what was restored, up to its promotion.
fn recovered(dir: &str) -> Server {
    let server = Server::over(PathBuf::from(dir));
    wait("recovery ends", || sql(&server, "SELECT pg_is_in_recovery()") == "f");
    server
}

/// Restores, recovers, and compares with the plan; returns the last transaction.
#[track_caller]
fn both(scene: &Scene, target: &[&str]) -> u64 {
    let to = scene.at("copy");
    let restored = scene.json(&[&["restore", "--to", &to], target].concat());
    assert!(restored["restored"]["bytes"].as_u64() > Some(1_000_000), "{restored}");
    let server = recovered(&to);
    let last = last_of(&server);
    let plan = &restored["plan"];
    if let Some(planned) = plan["end"]["last"]["xid"].as_u64() {
        assert_eq!(last, planned, "{target:?}: {plan}");
    }
    if let Some(next) = plan["end"]["next"]["xid"].as_u64() {
        let there = sql(&server, &format!("SELECT count(*) FROM ledger WHERE xid = {next}"));
        assert_eq!(there, "0", "{target:?}: {plan}");
    }
    let archiving = sql(&server, "SHOW archive_mode");
    assert_eq!(archiving, "off", "a copy does not archive into the original's place");
    last
}

#[test]
fn as_root_each_target_ends_where_the_plan_says() {
    story("restore::as_root_each_target_ends_where_the_plan_says", || {
        let scene = Scene::new();
        let before_all = jiff::Timestamp::now().to_string();
        let begun = scene.write(2);
        let first = scene.back_up(&["--name", "shop"]);
        assert_eq!([&first["mode"], &first["node"], &first["status"]], ["full", "shop", "DONE"]);
        let early = scene.write(3);
        let second = scene.back_up(&[]);
        assert_eq!([&second["mode"], &second["parent"]], [&Value::from("incremental"), &first["id"]]);
        assert!(second["stored_bytes"].as_u64() < first["stored_bytes"].as_u64(), "{second}");
        let good = scene.write(3);
        let (moment, lsn) = {
            let now =
                sql(&scene.server, "SELECT clock_timestamp() AT TIME ZONE 'Asia/Tokyo' || ' Asia/Tokyo'");
            (now, sql(&scene.server, "SELECT pg_current_wal_insert_lsn()"))
        };
        sql(&scene.server, "SELECT pg_create_restore_point('it''s here')");
        let bad = scene.write(3);
        scene.archive_everything();

        let dry = scene.at("dry");
        let plan = scene.told(&["restore", "--to", &dry, "--dry-run", "--target-time", &moment]);
        let line = |heading: &str| {
            let found = plan.lines().find(|line| line.starts_with(heading));
            found.unwrap_or_else(|| panic!("{heading}: {plan}")).to_owned()
        };
        assert!(line("backup").contains(second["id"].as_str().unwrap()), "{plan}");
        assert!(line("the last there").contains(&format!("transaction {},", good[2])), "{plan}");
        assert!(line("the first not there").contains(&format!("transaction {},", bad[0])), "{plan}");
        assert!(plan.contains("archive_command is taken out"), "{plan}");
        assert!(!fs::exists(&dry).unwrap(), "a plan touches nothing");

        let promote = ["--target-action", "promote"];
        let xid = good[1].to_string();
        let both = |target: &[&str]| both(&scene, &[target, &promote].concat());
        assert_eq!(both(&["--target-time", &moment]), good[2]);
        assert_eq!(both(&["--target-lsn", &lsn]), good[2]);
        assert_eq!(both(&["--target-name", "it's here"]), good[2]);
        assert_eq!(both(&["--target-xid", &xid]), good[1]);
        assert_eq!(both(&["--target-xid", &xid, "--exclusive"]), good[0]);
        // An older moment needs the older backup, and finds it by itself.
        assert_eq!(both(&["--target-xid", &early[1].to_string(), "--target-timeline", "current"]), early[1]);
        assert_eq!(both(&["--target-immediate", "--backup", "first"]), begun[1]);
        let latest = both_latest(&scene);
        assert_eq!(latest, bad[2]);

        let to = scene.at("copy");
        let refused = |options: &[&str]| scene.refused(&[&["restore", "--to", &to], options].concat());
        for (options, code, words) in [
            (&["--target-time", "2026-11-20 20:54:54"][..], 2, "does not say in which time zone"),
            (&["--target-lsn", "here"], 2, "is no position in WAL"),
            (&["--target-immediate", "--exclusive"], 2, "can be left out"),
            (&["--target-action", "promote"], 2, "means nothing without a target"),
            (&["--target-time", &before_all], 3, "before the first moment that can be restored"),
            (&["--target-time", "2099-01-01 00:00+00"], 3, "is not reached: WAL is there up to"),
            (&["--target-lsn", first["begin_lsn"].as_str().unwrap()], 3, "before the first moment"),
            (&["--target-name", "nowhere"], 3, "is not in the WAL"),
            (&["--target-timeline", "7"], 3, "there is no timeline 7"),
            (&["--backup", "20010101T000000"], 1, "there is no backup 20010101T000000"),
            (&["--backup", "yesterday"], 2, "is no backup"),
            (&["--cluster-system", "17"], 1, "has nothing of cluster 17"),
            (&["--tablespace", "16385=/nowhere"], 3, "has no tablespace 16385"),
        ] {
            let (exit, text) = refused(options);
            assert!(text.contains(words) && exit == code, "{options:?}: {exit} {text}");
            assert!(exit == 2 || text.contains("hint:"), "{options:?}: {text}");
        }
        let running = scene.server.data_dir().display().to_string();
        let over = |to: &str, options: &[&str]| scene.refused(&[&["restore", "--to", to], options].concat());
        let (exit, text) = over(&running, &["--delta", "--yes"]);
        assert!(exit == 3 && text.contains("PostgreSQL runs in"), "{text}");
        fs::create_dir(scene.at("mine")).unwrap();
        fs::write(scene.at("mine/thesis"), "twenty years of work").unwrap();
        let (exit, text) = over(&scene.at("mine"), &[]);
        assert!(exit == 3 && text.contains("is not empty"), "{text}");
        let (exit, text) = over(&scene.at("mine"), &["--delta", "--yes"]);
        assert!(exit == 3 && text.contains("is no data directory"), "{text}");
        assert!(fs::exists(scene.at("mine/thesis")).unwrap());
        fs::write(scene.at("secret"), "another passphrase\n").unwrap();
        let (exit, text) = refused(&[]);
        assert!(exit == 1 && text.contains("passphrase"), "{text}");
    });
}

/// Without a target: everything, and a primary at the end.
fn both_latest(scene: &Scene) -> u64 {
    both(scene, &[])
}

#[test]
fn as_root_a_restore_pauses_goes_over_what_is_there_and_on_where_it_was_interrupted() {
    let name = "restore::as_root_a_restore_pauses_goes_over_what_is_there_and_on_where_it_was_interrupted";
    story(name, || {
        let scene = Scene::new();
        sql(&scene.server, "CREATE TABLE filler AS SELECT n, md5(n::text) FROM generate_series(1, 300000) n");
        scene.back_up(&[]);
        let good = scene.write(2);
        let bad = scene.write(1);
        scene.archive_everything();
        let to = scene.at("copy");
        let options = ["restore", "--to", &to, "--target-xid", &good[1].to_string()].map(str::to_owned);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();

        // Killed, and ended by Ctrl-C, each at another moment.
        for (signal, delta) in [("-KILL", &[][..]), ("-INT", &["--delta"][..])] {
            let slow = ["--max-rate", "4", "--jobs", "2", "--repository", &scene.repository];
            let before = std::time::SystemTime::now();
            let mut restoring = program()
                .args(&options)
                .args(delta)
                .args(slow)
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // The marker is written anew by each of them, and is there before anything else.
            let begun = || {
                let written =
                    fs::metadata(scene.at("copy/pgherd.restoring")).and_then(|seen| seen.modified());
                fs::exists(scene.at("copy/base/1")).unwrap() && written.is_ok_and(|written| written > before)
            };
            wait("it has begun", begun);
            assert!(restoring.try_wait().unwrap().is_none(), "it was too fast to be interrupted");
            let pid = restoring.id().to_string();
            assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
            let ended = restoring.wait_with_output().unwrap();
            if signal == "-INT" {
                assert_eq!(ended.status.code(), Some(130), "{}", said(&ended));
                assert!(said(&ended).contains("--delta goes on with it"), "{}", said(&ended));
                assert!(!said(&ended).contains("panicked"), "{}", said(&ended));
            }
            let started = std::process::Command::new(programs().join("postgres"))
                .args(["-h", "", "-k", "", "-p", "29999", "-D", &to])
                .output()
                .unwrap();
            assert!(!started.status.success(), "half a data directory came up");
            let (exit, text) = scene.refused(&options);
            assert!(
                exit == 3 && text.contains("did not come to its end") && text.contains("--delta"),
                "{text}"
            );
        }
        let restored = scene.json(&[&options[..], &["--delta"]].concat());
        assert_eq!(restored["plan"]["standing"], "interrupted");
        let server = Server::over(PathBuf::from(&to));
        wait("it pauses", || sql(&server, "SELECT pg_get_wal_replay_pause_state()") == "paused");
        assert_eq!(last_of(&server), good[1]);
        sql(&server, "SELECT pg_wal_replay_resume()");
        wait("it is a primary", || sql(&server, "SELECT pg_is_in_recovery()") == "f");
        write(&server);
        // Its directory is removed with it, so a copy of it is what is gone over.
        let mut stopped = std::process::Command::new(programs().join("pg_ctl"));
        assert!(stopped.args(["-D", &to, "-m", "fast", "-w", "stop"]).output().unwrap().status.success());
        let again = scene.at("again");
        let copied = std::process::Command::new("cp").args(["-a", &to, &again]).status().unwrap();
        assert!(copied.success());
        drop(server);

        let over = ["restore", "--to", &again, "--delta", "--target-immediate", "--target-action", "promote"];
        let (exit, text) = scene.refused(&over);
        assert!(exit == 2 && text.contains("--yes"), "nobody is there to be asked: {text}");
        let restored = scene.json(&[&over[..], &["--yes"]].concat());
        assert_eq!(restored["plan"]["standing"], "data_directory");
        let fetched = restored["restored"]["fetched_bytes"].as_u64().unwrap();
        assert!(fetched < restored["restored"]["bytes"].as_u64().unwrap() / 2, "{restored}");
        let server = recovered(&again);
        assert_eq!(sql(&server, "SELECT count(*) FROM ledger"), "0");
        assert_eq!(sql(&server, "SELECT count(*) FROM filler"), "300000");
        assert!(bad[0] > 0);
    });
}

#[test]
fn as_root_without_wal_there_is_no_backup_and_what_to_do_is_said() {
    story("restore::as_root_without_wal_there_is_no_backup_and_what_to_do_is_said", || {
        let scene = Scene::new();
        sql(&scene.server, "ALTER SYSTEM SET archive_command = 'false'");
        sql(&scene.server, "SELECT pg_reload_conf()");
        let data_dir = scene.server.data_dir().display().to_string();
        let create = ["backup", "create", "--fast", "--data-dir", &data_dir];
        let (exit, text) = scene.refused(&[&create[..], &["--wal-timeout", "1s"]].concat());
        assert_eq!(exit, 1, "{text}");
        assert!(text.contains("has not come into the archive") && text.contains("archive_command"), "{text}");
        let (_, text) = scene.refused(&["restore", "--to", &scene.at("copy")]);
        assert!(text.contains("there is no base backup") && text.contains("pgherd backup create"), "{text}");
        let (_, text) = scene.refused(&[&create[..], &["--port", "1"]].concat());
        assert!(text.contains("cannot connect") && text.contains("--host"), "{text}");
        let (_, text) = scene.refused(&[&create[..], &["--name", "Shop!"]].concat());
        assert!(text.contains("lower-case"), "{text}");
        let (_, text) = scene.refused(&["backup", "create", "--data-dir", &scene.at("objects")]);
        assert!(text.contains("is no data directory"), "{text}");
    });
}
