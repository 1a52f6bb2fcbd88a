//! What `pgherd restore --table` brings back, and what it leaves alone.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::backed_up::of_app;
use crate::repository::{Scene, program, said, story, wait};
use crate::server::sql;

/// A shop, of which a backup is taken; then an order more, and all of them are deleted.
struct Shop {
    scene: Scene,
    /// The transaction of the last order.
    good: String,
    into: String,
    scratch: String,
}

impl Shop {
    fn new() -> Shop {
        let scene = Scene::new();
        for statement in [
            "CREATE ROLE app",
            "CREATE ROLE reader",
            "CREATE SCHEMA shop AUTHORIZATION app",
            "CREATE TABLE shop.customers (id int PRIMARY KEY)",
            "INSERT INTO shop.customers VALUES (1), (2)",
            "CREATE TABLE shop.orders (id serial PRIMARY KEY, customer int REFERENCES shop.customers, amount numeric CHECK (amount > 0), note text)",
            "CREATE INDEX by_customer ON shop.orders (customer)",
            "CREATE FUNCTION shop.stamp() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'",
            "CREATE TRIGGER stamp BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.stamp()",
            "CREATE STATISTICS shop.both ON customer, amount FROM shop.orders",
            "ALTER TABLE shop.orders OWNER TO app",
            "GRANT SELECT ON shop.orders TO reader",
            "CREATE TABLE shop.log (at int, what text) PARTITION BY RANGE (at)",
            "CREATE TABLE shop.log_1 PARTITION OF shop.log FOR VALUES FROM (0) TO (10)",
            "CREATE TABLE shop.log_2 PARTITION OF shop.log FOR VALUES FROM (10) TO (20)",
            "INSERT INTO shop.log SELECT n, 'x' FROM generate_series(0, 19) n",
            "CREATE UNLOGGED TABLE shop.fleeting (n int)",
            "CREATE VIEW shop.dear AS SELECT * FROM shop.orders WHERE amount > 100",
            "CREATE TABLE shop.\"Odd.Name\" (\"N\" int)",
            "INSERT INTO shop.\"Odd.Name\" VALUES (7)",
            "INSERT INTO shop.orders (customer, amount, note) SELECT n % 2 + 1, n, 'it''s \\ ' || n FROM generate_series(1, 1000) n",
        ] {
            sql(&scene.server, statement);
        }
        scene.back_up(&[]);
        let insert =
            "INSERT INTO shop.orders (customer, amount) VALUES (1, 5) RETURNING pg_current_xact_id()";
        let good = sql(&scene.server, insert);
        sql(&scene.server, "DELETE FROM shop.orders");
        sql(&scene.server, "DELETE FROM shop.log");
        scene.archive_everything();
        let into = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", scene.server.port);
        let scratch = scene.at("s");
        fs::create_dir(&scratch).unwrap();
        Shop { scene, good, into, scratch }
    }

    fn arguments<'a>(&'a self, options: &[&'a str]) -> Vec<&'a str> {
        let always =
            ["restore", "--target-xid", &self.good, "--scratch-dir", &self.scratch, "--into", &self.into];
        [&always[..], options].concat()
    }

    #[track_caller]
    fn bring(&self, options: &[&str]) -> Value {
        let brought = self.scene.json(&[&self.arguments(options)[..], &["--yes"]].concat());
        self.nothing_is_left();
        brought["brought"].clone()
    }

    #[track_caller]
    fn refused(&self, options: &[&str]) -> (i32, String) {
        let refused = self.scene.refused(&[&self.arguments(options)[..], &["--yes"]].concat());
        self.nothing_is_left();
        refused
    }

    fn ask(&self, question: &str) -> String {
        sql(&self.scene.server, question)
    }

    #[track_caller]
    fn nothing_is_left(&self) {
        let left: Vec<_> = fs::read_dir(&self.scratch).unwrap().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(servers_in(&self.scratch), Vec::<String>::new());
    }
}

/// Processes of PostgreSQL that stand below a directory.
fn servers_in(dir: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let stands = all.filter_map(|entry| fs::read_link(entry.path().join("cwd")).ok());
    stands.map(|cwd| cwd.display().to_string()).filter(|cwd| cwd.starts_with(dir)).collect()
}

fn names(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

#[test]
fn as_root_a_table_comes_back_beside_what_is_there() {
    story("tables::as_root_a_table_comes_back_beside_what_is_there", || {
        let shop = Shop::new();
        let plan = shop.scene.told(&shop.arguments(&["--table", "shop.orders", "--dry-run"]));
        assert!(plan.contains("shop.orders of database postgres, as restored.orders"), "{plan}");
        assert!(plan.contains(&format!("transaction {},", shop.good)), "{plan}");
        shop.nothing_is_left();
        assert_eq!(shop.ask("SELECT count(*) FROM pg_namespace WHERE nspname = 'restored'"), "0");
        let (exit, text) = shop.scene.refused(&shop.arguments(&["--table", "shop.orders"]));
        assert!(exit == 2 && text.contains("--yes"), "nobody is there to be asked: {text}");

        let brought = shop.bring(&["--table", "shop.orders", "--table", "shop.log"]);
        let [orders, log] = brought["tables"].as_array().unwrap().as_slice() else { panic!("{brought}") };
        assert_eq!(
            [&orders["brought_as"], &orders["rows"], &orders["owner"]],
            [&"restored.orders".into(), &Value::from(1001), &"app".into()]
        );
        let left_out = names(&orders["left_out"]).join(", ");
        for what in ["foreign key orders_customer_fkey", "trigger stamp", "statistics both"] {
            assert!(left_out.contains(what), "{left_out}");
        }
        assert_eq!(names(&orders["indexes"]), ["by_customer", "orders_pkey"]);
        assert_eq!(names(&orders["sequences"]), ["orders_id_seq"]);
        assert_eq!([&log["rows"], &log["partitions"]], [20, 2]);
        assert_eq!(
            shop.ask("SELECT count(*), sum(amount), count(note) FROM restored.orders"),
            "1001|500505|1000"
        );
        assert_eq!(shop.ask("SELECT note FROM restored.orders WHERE id = 7"), "it's \\ 7");
        assert_eq!(shop.ask("SELECT count(*) FROM restored.log WHERE at >= 10"), "10");
        // WAL has a sequence up to 32 values ahead.
        let next: u32 = shop.ask("SELECT nextval('restored.orders_id_seq')").parse().unwrap();
        assert!((1002..=1034).contains(&next), "{next}");
        assert_eq!(shop.ask("SELECT count(*) FROM shop.orders"), "0", "what is there is not touched");
        assert_eq!(shop.ask("SELECT has_table_privilege('reader', 'restored.orders', 'select')"), "f");

        let (exit, text) = shop.refused(&["--table", "shop.orders"]);
        assert!(
            exit == 3 && text.contains("restored.orders is there already") && text.contains("--as"),
            "{text}"
        );
        let brought = shop.bring(&["--table", "Shop.Orders", "--as", "orders_before"]);
        assert_eq!(brought["tables"][0]["brought_as"], "shop.orders_before");
        assert_eq!(
            names(&brought["tables"][0]["indexes"]),
            ["orders_before_by_customer", "orders_before_pkey"]
        );
        assert_eq!(shop.ask("SELECT count(*) FROM shop.orders_before"), "1001");
        let brought =
            shop.bring(&["--table", "shop.\"Odd.Name\"", "--into-schema", "\"Old one\"", "--no-owner"]);
        assert_eq!(brought["tables"][0]["brought_as"], "\"Old one\".\"Odd.Name\"");
        assert_eq!(shop.ask("SELECT \"N\" FROM \"Old one\".\"Odd.Name\""), "7");
        // One partition by itself is a table like any other, and found without its schema.
        let brought = shop.bring(&["--table", "log_2", "--as", "second"]);
        assert_eq!(names(&brought["tables"][0]["left_out"]), ["that it belongs to shop.log"]);
        assert_eq!(shop.ask("SELECT count(*) FROM shop.second"), "10");
    });
}

#[test]
fn as_root_a_table_comes_back_in_its_place_as_it_was() {
    story("tables::as_root_a_table_comes_back_in_its_place_as_it_was", || {
        let shop = Shop::new();
        let (exit, text) = shop.refused(&["--table", "shop.orders", "--in-place"]);
        assert!(exit == 3 && text.contains("shop.orders is there already"), "{text}");
        shop.ask("DROP TABLE shop.orders CASCADE");
        // What its foreign key needs is not there: all of it is undone.
        shop.ask("DELETE FROM shop.customers WHERE id = 2");
        let (exit, text) = shop.refused(&["--table", "shop.orders", "--in-place"]);
        assert!(
            exit == 1 && text.contains("orders_customer_fkey") && text.contains("undone"),
            "{exit} {text}"
        );
        assert_eq!(shop.ask("SELECT to_regclass('shop.orders')"), "");
        shop.ask("INSERT INTO shop.customers VALUES (2)");
        let brought = shop.bring(&["--table", "shop.orders", "--in-place"]);
        assert_eq!(brought["tables"][0]["rows"], 1001);
        assert_eq!(names(&brought["tables"][0]["left_out"]), Vec::<&str>::new());
        assert_eq!(shop.ask("SELECT tableowner FROM pg_tables WHERE tablename = 'orders'"), "app");
        assert_eq!(shop.ask("SELECT has_table_privilege('reader', 'shop.orders', 'select')"), "t");
        assert_eq!(
            shop.ask(
                "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'shop.orders'::regclass AND tgname = 'stamp'"
            ),
            "1"
        );
        assert_eq!(
            shop.ask("SELECT count(*) FROM pg_constraint WHERE conrelid = 'shop.orders'::regclass"),
            "3"
        );
        let next = "INSERT INTO shop.orders (customer, amount) VALUES (1, 1) RETURNING id";
        assert!((1002..=1034).contains(&shop.ask(next).parse().unwrap()));

        shop.ask("DROP TABLE shop.orders");
        shop.ask("ALTER ROLE reader RENAME TO somebody");
        let (exit, text) = shop.refused(&["--table", "shop.orders", "--in-place"]);
        assert!(exit == 3 && text.contains("no role reader") && text.contains("--no-owner"), "{text}");
    });
}

#[test]
fn as_root_what_cannot_come_back_is_refused_with_what_there_was() {
    story("tables::as_root_what_cannot_come_back_is_refused_with_what_there_was", || {
        let shop = Shop::new();
        shop.ask("CREATE SCHEMA restored");
        for (options, code, words) in [
            (
                &["--table", "shop.ordres"][..],
                3,
                &["no table shop.ordres in database postgres", "there were: shop.orders"][..],
            ),
            (&["--table", "shop.\"Orders\""], 3, &["no table shop.\"Orders\"", "shop.orders"]),
            (&["--table", "nothing_like_it"], 3, &["no table nothing_like_it", "another moment"]),
            (&["--table", "shop.orders", "--database", "nowhere"], 3, &["no database nowhere", "postgres"]),
            (&["--table", "shop.dear"], 3, &["was a view"]),
            (&["--table", "shop.fleeting"], 3, &["was unlogged"]),
            (
                &["--table", "shop.log", "--as", "journal"],
                3,
                &["2 partitions cannot all be given one name", "--into-schema"],
            ),
            (&["--table", "shop.orders", "--superuser", "nobody"], 1, &["nobody", "--superuser"]),
            (&["--table", "shop.orders", "--superuser", "app"], 1, &["app"]),
            (&["--table", "a.b.c"], 2, &["--database names the database"]),
            (&["--table", "a", "--table", "b", "--as", "c"], 2, &["--as gives one table a name"]),
            (&["--table", "shop.orders", "--bin-dir", "/nowhere"], 1, &["/nowhere has no postgres"]),
            (&["--table", "shop.orders", "--target-name", "x"], 2, &["cannot be used with"]),
        ] {
            let (exit, text) = shop.refused(options);
            for word in words {
                assert!(exit == code && text.contains(word), "{options:?}: {exit} {text}");
            }
        }
        let refused = |options: &[&str]| {
            shop.scene.refused(
                &[&["restore", "--table", "shop.orders", "--scratch-dir", &shop.scratch, "--yes"], options]
                    .concat(),
            )
        };
        let (exit, text) = refused(&["--into", "host=127.0.0.1 port=1 user=postgres"]);
        assert!(exit == 1 && text.contains("cannot be asked") && text.contains("--into"), "{text}");
        let (exit, text) = refused(&[]);
        assert!(exit != 0 && text.contains("--into CONNINFO"), "{text}");
        let long = format!("/tmp/{}", "x".repeat(100));
        let (exit, text) = shop.scene.refused(&[
            "restore",
            "--table",
            "a",
            "--scratch-dir",
            &long,
            "--into",
            &shop.into,
            "--yes",
        ]);
        assert!(exit == 1 && text.contains("--scratch-dir"), "{text}");
        shop.nothing_is_left();
    });
}

#[test]
fn as_root_what_a_killed_command_leaves_is_removed_by_the_next_one() {
    story("tables::as_root_what_a_killed_command_leaves_is_removed_by_the_next_one", || {
        let shop = Shop::new();
        let begin = || {
            program()
                .args(shop.arguments(&[
                    "--table",
                    "shop.orders",
                    "--yes",
                    "--repository",
                    &shop.scene.repository,
                ]))
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut killed = begin();
        wait("a server runs", || !servers_in(&shop.scratch).is_empty());
        assert!(killed.try_wait().unwrap().is_none(), "it was too fast to be killed");
        killed.kill().unwrap();
        killed.wait().unwrap();
        wait("its server does not outlive it", || servers_in(&shop.scratch).is_empty());
        let left =
            || fs::read_dir(&shop.scratch).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        let [dir] = left().try_into().unwrap();

        let mut interrupted = begin();
        wait("another server runs", || !servers_in(&shop.scratch).is_empty());
        assert!(!left().contains(&dir), "what was left is gone by then");
        let pid = interrupted.id().to_string();
        assert!(interrupted.try_wait().unwrap().is_none(), "it was too fast to be interrupted");
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        let ended = interrupted.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{}", said(&ended));
        assert!(said(&ended).contains("an earlier command that was killed had left"), "{}", said(&ended));
        assert!(said(&ended).contains("nothing was brought in"), "{}", said(&ended));
        shop.nothing_is_left();
        assert_eq!(shop.ask("SELECT to_regclass('restored.orders')"), "");
        shop.bring(&["--table", "shop.orders"]);

        // A commit that waits for a standby has happened, whatever becomes of who asked for it.
        shop.ask("ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
        shop.ask("SELECT pg_reload_conf()");
        let late = program()
            .args(shop.arguments(&["--table", "shop.orders", "--as", "late", "--yes"]))
            .args(["--repository", &shop.scene.repository])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name LIKE 'pgherd restore %'";
        wait("its commit waits", || shop.ask(waits) == "1");
        let pid = late.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let ended = late.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(130), "{}", said(&ended));
        assert!(said(&ended).contains("it is not known yet whether the tables come"), "{}", said(&ended));
        shop.nothing_is_left();
        shop.ask("ALTER SYSTEM RESET synchronous_standby_names");
        shop.ask("SELECT pg_reload_conf()");
        wait("it is there", || shop.ask("SELECT to_regclass('shop.late')") == "shop.late");
    });
}

#[test]
fn as_root_what_is_set_or_taken_in_the_original_does_not_stand_in_the_way() {
    story("tables::as_root_what_is_set_or_taken_in_the_original_does_not_stand_in_the_way", || {
        let shop = Shop::new();
        shop.ask("CREATE DATABASE app");
        for statement in [
            "CREATE TABLE bill AS SELECT n FROM generate_series(1, 30) n",
            "CREATE INDEX by_n ON bill (n)",
            // Of an earlier copy, with the names that this one gets, and gone by now.
            "CREATE SCHEMA restored",
            "CREATE TABLE restored.bill (n int)",
            "CREATE INDEX by_n ON restored.bill (n)",
            "CREATE FUNCTION never() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''not here''; END'",
            "CREATE EVENT TRIGGER never ON ddl_command_start EXECUTE FUNCTION never()",
        ] {
            of_app(&shop.scene.server, statement);
        }
        shop.ask("ALTER DATABASE app SET default_transaction_read_only = on");
        shop.ask("ALTER DATABASE app SET session_preload_libraries = 'no_such_library'");
        shop.scene.archive_everything();
        let bring =
            ["restore", "--database", "app", "--scratch-dir", &shop.scratch, "--into", &shop.into, "--yes"];
        for (options, place) in [
            (&["--table", "public.bill"][..], "restored.bill"),
            (&["--table", "public.bill", "--as", "by_n"], "public.by_n"),
        ] {
            let brought = shop.scene.json(&[&bring[..], options].concat());
            assert_eq!(brought["brought"]["tables"][0]["brought_as"], place);
            shop.nothing_is_left();
            assert_eq!(shop.ask(&format!("SELECT count(*) FROM {place}")), "30");
        }
    });
}

#[test]
fn as_root_limits_that_were_raised_behind_the_backup_do_not_hold_a_recovery_up() {
    story("tables::as_root_limits_that_were_raised_behind_the_backup_do_not_hold_a_recovery_up", || {
        let mut shop = Shop::new();
        shop.scene.server.kill_and_start("max_connections = 150\nmax_prepared_transactions = 7\n");
        sql(&shop.scene.server, "CREATE TABLE shop.later AS SELECT 1 AS n");
        shop.scene.archive_everything();
        let into = shop.into.clone();
        let brought = shop.scene.json(&[
            "restore",
            "--table",
            "shop.later",
            "--scratch-dir",
            &shop.scratch,
            "--into",
            &into,
            "--yes",
        ]);
        assert_eq!(brought["brought"]["tables"][0]["rows"], 1);
        shop.nothing_is_left();
    });
}
