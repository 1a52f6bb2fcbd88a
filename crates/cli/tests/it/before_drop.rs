//! `--before-drop` ends just before the drop that is meant, and takes nothing else for one.

use std::fs;

use serde_json::Value;

use crate::backed_up::of_app;
use crate::repository::{Scene, story};
use crate::server::sql;

fn plan(scene: &Scene, options: &[&str]) -> Value {
    let to = scene.at("copy");
    scene.json(&[&["restore", "--to", &to, "--dry-run"], options].concat())["plan"].clone()
}

/// The last OID and transaction of a table that is dropped by this statement.
fn dropped_by(scene: &Scene, table: &str, statement: &str) -> (u64, u64) {
    let oid = sql(&scene.server, &format!("SELECT '{table}'::regclass::oid::bigint")).parse().unwrap();
    let statements = format!("BEGIN; SELECT pg_current_xact_id(); {statement}; COMMIT");
    (oid, sql(&scene.server, &statements).parse().unwrap())
}

#[test]
fn as_root_recovery_ends_before_the_drop_and_the_table_comes_back() {
    story("before_drop::as_root_recovery_ends_before_the_drop_and_the_table_comes_back", || {
        let mut scene = Scene::new();
        if sql(&scene.server, "SHOW server_version_num").parse::<u32>().unwrap() < 150_000 {
            scene.back_up(&[]);
            scene.archive_everything();
            let (exit, text) =
                scene.refused(&["restore", "--to", &scene.at("copy"), "--before-drop", "ledger"]);
            assert!(exit == 3 && text.contains("does not write into WAL"), "{text}");
            return;
        }
        scene.server.kill_and_start("wal_compression = pglz\n");
        for statement in [
            "CREATE SCHEMA shop",
            "CREATE SCHEMA other",
            "CREATE TABLE shop.orders (n int PRIMARY KEY)",
            "CREATE TABLE other.orders (n int)",
            "INSERT INTO shop.orders SELECT generate_series(1, 100)",
            "CREATE DATABASE app",
        ] {
            sql(&scene.server, statement);
        }
        of_app(&scene.server, "CREATE TABLE lease AS SELECT generate_series(1, 9) AS n");
        of_app(&scene.server, "CREATE TABLE early (n int)");
        scene.back_up(&[]);
        // All of these let go of files of the table, and it is there afterwards.
        for statement in [
            "TRUNCATE shop.orders",
            "INSERT INTO shop.orders SELECT generate_series(1, 70)",
            "VACUUM FULL shop.orders",
        ] {
            sql(&scene.server, statement);
        }
        scene.archive_everything();
        let (exit, text) = scene.refused(&[
            "restore",
            "--to",
            &scene.at("copy"),
            "--dry-run",
            "--before-drop",
            "shop.orders",
        ]);
        assert!(exit == 3 && text.contains("no table shop.orders was dropped"), "{text}");

        sql(&scene.server, "BEGIN; DROP TABLE shop.orders; ROLLBACK");
        let before = scene.write(1);
        dropped_by(&scene, "other.orders", "DROP TABLE other.orders");
        let (oid, xid) = dropped_by(&scene, "shop.orders", "DROP TABLE shop.orders");
        scene.write(1);
        // One that did not exist when the backup was taken, in a schema that did not; and one of a name that was used twice.
        sql(&scene.server, "CREATE SCHEMA young");
        sql(&scene.server, "CREATE TABLE young.leaf AS SELECT generate_series(1, 5) AS n");
        let (young, young_xid) = dropped_by(&scene, "young.leaf", "DROP SCHEMA young CASCADE");
        sql(&scene.server, "CREATE TABLE shop.twice (n int)");
        sql(&scene.server, "DROP TABLE shop.twice");
        sql(&scene.server, "CREATE TABLE shop.twice (n int)");
        let (twice, twice_xid) = dropped_by(&scene, "shop.twice", "DROP TABLE shop.twice");
        // One that went before its database, and one that went with it.
        let early = of_app(&scene.server, "SELECT 'early'::regclass::oid::bigint").parse::<u64>().unwrap();
        of_app(&scene.server, "DROP TABLE early");
        let lease = of_app(&scene.server, "SELECT 'lease'::regclass::oid::bigint").parse::<u64>().unwrap();
        sql(&scene.server, "DROP DATABASE app");
        scene.write(1);
        scene.archive_everything();
        for (table, oid, with_database) in [("early", early, false), ("public.lease", lease, true)] {
            let plan = plan(&scene, &["--before-drop", table]);
            let dropped = &plan["dropped"];
            assert_eq!(
                [&dropped["oid"], &dropped["with_database"], &dropped["database"]],
                [&Value::from(oid), &with_database.into(), &"app".into()],
                "{plan}"
            );
        }

        for (table, oid, xid) in [
            ("shop.orders", oid, xid),
            ("young.leaf", young, young_xid),
            ("Shop.Twice", twice, twice_xid),
            ("leaf", young, young_xid),
        ] {
            let plan = plan(&scene, &["--before-drop", table]);
            let dropped = &plan["dropped"];
            assert_eq!(
                [&dropped["oid"], &dropped["xid"], &dropped["database"]],
                [&Value::from(oid), &xid.into(), &"postgres".into()],
                "{plan}"
            );
            assert_eq!(
                [&plan["end"]["next"]["xid"], &plan["end"]["lsn"]],
                [&Value::from(xid), &dropped["lsn"]],
                "{plan}"
            );
        }
        let told =
            scene.told(&["restore", "--to", &scene.at("copy"), "--dry-run", "--before-drop", "shop.orders"]);
        assert!(
            told.contains(&format!(
                "before shop.orders of database postgres (OID {oid}) was dropped, by transaction {xid},"
            )),
            "{told}"
        );

        let scratch = scene.at("s");
        fs::create_dir(&scratch).unwrap();
        let into = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", scene.server.port);
        let bring =
            ["restore", "--table", "shop.orders", "--before-drop", "shop.orders", "--in-place", "--yes"];
        let brought = scene.json(&[&bring[..], &["--scratch-dir", &scratch, "--into", &into]].concat());
        assert_eq!(
            brought["brought"]["tables"][0]["rows"], 70,
            "as it was in the end, and not in the backup"
        );
        assert_eq!(sql(&scene.server, "SELECT count(*) FROM shop.orders"), "70");
        assert!(before[0] < xid);
        let bring = ["restore", "--table", "lease", "--before-drop", "lease", "--yes"];
        let brought = scene.json(&[&bring[..], &["--scratch-dir", &scratch, "--into", &into]].concat());
        assert_eq!(
            [&brought["plan"]["database"], &brought["brought"]["tables"][0]["rows"]],
            [&Value::from("app"), &9.into()],
            "out of a database that is not there any more"
        );
        assert_eq!(sql(&scene.server, "SELECT count(*) FROM restored.lease"), "9");

        let options =
            |options: &[&'static str]| [&["restore", "--to", "/nowhere/copy", "--dry-run"], options].concat();
        let (exit, text) = scene.refused(&options(&["--before-drop", "shop.nothing"]));
        assert!(
            exit == 3 && text.contains("no table shop.nothing was dropped") && text.contains("--target-time"),
            "{text}"
        );
        let (exit, text) = scene.refused(&options(&["--before-drop", "shop.orders", "--database", "app"]));
        assert!(exit == 3, "it is of another database: {text}");
        let (exit, text) = scene.refused(&options(&["--before-drop", "shop.orders", "--exclusive"]));
        assert!(exit == 2 && text.contains("can be left out"), "{text}");
        let (exit, text) = scene.refused(&options(&["--before-drop", "shop.orders", "--target-xid", "7"]));
        assert!(exit == 2 && text.contains("cannot be used with"), "{text}");
    });
}
