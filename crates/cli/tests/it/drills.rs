//! What a drill passes can be restored, and what cannot fails one.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::backed_up::backup;
use crate::herd::{Herd, kill, wait_for};
use crate::repository::{Scene, story};
use crate::server::sql;

fn drill(scene: &Scene, options: &[&str]) -> (i32, Value) {
    let scratch = scene.at("s");
    fs::create_dir_all(&scratch).unwrap();
    let output = scene.call(&[&["backup", "drill", "--json", "--scratch-dir", &scratch], options].concat());
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0, "nothing is left");
    let told = serde_json::from_str(&told)
        .unwrap_or_else(|error| panic!("{error}: {told} {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), told)
}

fn outcome<'a>(drill: &'a Value, name: &str) -> (&'a str, String) {
    let checks = drill["checks"].as_array().unwrap();
    let check =
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {drill}"));
    (check["outcome"].as_str().unwrap(), check["told"].to_string())
}

#[test]
fn as_root_a_drill_tells_what_can_be_restored_from_what_cannot() {
    story("drills::as_root_a_drill_tells_what_can_be_restored_from_what_cannot", || {
        let scene = Scene::new();
        let written = scene.write(3);
        let backup = scene.back_up(&[]);
        let more = scene.write(3);
        scene.archive_everything();

        let count = "postgres=SELECT count(*) = 6 FROM ledger";
        let (exit, passed) = drill(&scene, &["--query", count]);
        assert!(exit == 0 && passed["passed"] == true, "{passed}");
        assert_eq!(
            [&passed["backup"], &passed["recovery"]["last"]["xid"]],
            [&backup["id"], &Value::from(more[2])]
        );
        for name in ["recovery", "queries", "indexes"] {
            assert_eq!(outcome(&passed, name).0, "passed", "{passed}");
        }
        let (came, why) = outcome(&passed, "checksums");
        assert!(
            came == "skipped" && why.contains("no data checksums"),
            "the server of this test has none: {why}"
        );
        assert!(
            passed["restore_seconds"].as_f64() > Some(0.0)
                && passed["recovery"]["seconds"].as_f64() > Some(0.0)
        );

        let xid = written[2].to_string();
        let (exit, early) = drill(&scene, &["--target-immediate", "--query", count, "--no-amcheck"]);
        assert!(exit == 1 && early["passed"] == false, "{early}");
        let (came, why) = outcome(&early, "queries");
        assert!(came == "failed" && why.contains("it is false"), "three rows came after {xid}: {why}");
        assert_eq!(outcome(&early, "recovery").0, "passed");
        let (exit, any) =
            drill(&scene, &["--random", "--query", "postgres=SELECT count(*) >= 3 FROM ledger"]);
        assert!(exit == 0 && any["target"].as_str().unwrap().starts_with("time "), "{any}");

        // An index whose function means something else than it did: what is in the table is not to be found by it.
        for statement in [
            "CREATE FUNCTION key(bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT $1'",
            "CREATE INDEX by_key ON ledger (key(xid))",
            "CREATE OR REPLACE FUNCTION key(bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT -$1'",
        ] {
            sql(&scene.server, statement);
        }
        scene.archive_everything();
        let options =
            ["--query", "postgres=SELECT nonsense", "--query", "postgres=SELECT n FROM ledger WHERE n < 0"];
        let (exit, broken) = drill(&scene, &options);
        assert!(exit == 1, "{broken}");
        let (came, why) = outcome(&broken, "indexes");
        assert!(came == "failed" && why.contains("by_key in postgres"), "{why}");
        let (came, why) = outcome(&broken, "queries");
        assert!(came == "failed" && why.contains("nonsense") && why.contains("there was no row"), "{why}");
        let told = scene.refused(&["backup", "drill", "--scratch-dir", &scene.at("s")]);
        assert_eq!(told.0, 1);

        let (exit, text) = scene.refused(&["backup", "drill", "--random", "--backup", "last"]);
        assert!(exit == 2, "{text}");
        let (exit, text) = scene.refused(&["backup", "drill", "--backup", "20010101T000000"]);
        assert!(exit == 1 && text.contains("there is no backup 20010101T000000"), "{text}");
    });
}

#[test]
fn as_root_a_standby_of_a_herd_makes_the_drills() {
    story("drills::as_root_a_standby_of_a_herd_makes_the_drills", || {
        let herd = Herd::new();
        herd.up();
        herd.wait_whole();
        wait_for("a standby to own the archive, and something that can be restored", || {
            let (backup, primary) = (backup(&herd)?, herd.primary()?);
            match backup["owner"].as_str() {
                Some(owner) if owner != primary && !backup["recovery_window"].is_null() => Ok(()),
                _ => Err(backup.to_string()),
            }
        });
        assert!(backup(&herd).unwrap()["drill"].is_null());
        // A drill leaves a tenth of its volume free: this one has more than the disk of a machine that builds.
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let scratch = scratch.path();
        let apply = |query: &str| {
            let file = herd.dir.parent().unwrap().join("herd.toml");
            let drill = format!(
                "[backup]\ndrill = \"* * * * *\"\ndrill_dir = \"{}\"\ndrill_queries = [\"app={query}\"]\n",
                scratch.display()
            );
            let stored = fs::read_to_string(herd.dir.join("herd.toml")).unwrap();
            let without = stored.lines().filter(|line| !line.starts_with("drill"));
            let text = without.map(|line| format!("{line}\n")).collect::<String>();
            fs::write(&file, text.replace("[backup]\n", &drill)).unwrap();
            herd.run(&["apply", "--herd", file.to_str().unwrap(), "--yes"]);
        };
        let came = |failed: bool| {
            move |herd: &Herd| {
                let drill = backup(herd)?["drill"].clone();
                match drill.is_object() && drill["failed"].is_string() == failed {
                    true => Ok(drill),
                    false => Err(drill.to_string()),
                }
            }
        };
        apply("SELECT count(*) >= 0 FROM pg_class");
        // An agent that is killed leaves no server, and the next one leaves no directory. The drill is made after all.
        let started = || -> Option<PathBuf> {
            let dirs = fs::read_dir(scratch).unwrap().flatten().map(|dir| dir.path());
            dirs.into_iter().find(|dir| dir.join("data/postmaster.pid").exists())
        };
        let dir =
            wait_longer("the server of a drill", || started().ok_or_else(|| "there is none".to_owned()));
        let owner = backup(&herd).unwrap()["owner"].as_str().unwrap().to_owned();
        kill(herd.agent(&owner).unwrap(), Signal::KILL).unwrap();
        wait_longer("what it left to be removed", || {
            if dir.exists() { Err(dir.display().to_string()) } else { Ok(()) }
        });
        let passed = wait_longer("a drill that passes", || came(false)(&herd));
        assert_ne!(passed["node"].as_str().unwrap(), herd.primary().unwrap(), "{passed}");
        assert!(passed["backup"].is_string(), "{passed}");
        let shown = herd.run(&["status"]);
        assert!(shown.contains("the drill of ") && shown.contains(" passed in "), "{shown}");
        let left = || fs::read_dir(scratch).unwrap().count();
        wait_longer("nothing to be left", || {
            if left() == 0 { Ok(()) } else { Err(format!("{} directories", left())) }
        });

        apply("SELECT 1 = 2");
        let failed = wait_longer("a drill that fails", || came(true)(&herd));
        assert!(failed["failed"].as_str().unwrap().contains("SELECT 1 = 2 in app: it is false"), "{failed}");
        let checked = herd.output(&["check"]);
        let told = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert_eq!(checked.status.code(), Some(2), "{told}");
        assert!(told.contains("it is false"), "{told}");

        herd.wait_whole();
        herd.run(&["down", "--delete", "--yes"]);
    });
}

/// A minute passes until the next one is due, and then it has to be made.
fn wait_longer<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) => assert!(began.elapsed() < Duration::from_secs(180), "{what}: {why}"),
        }
        // sleep: between two looks at the condition
        std::thread::sleep(Duration::from_millis(20));
    }
}
