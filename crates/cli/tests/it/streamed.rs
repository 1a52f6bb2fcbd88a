//! Base backups of a server that sends its files itself: what is restored is what it had, and what does not come whole is none.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::repository::{Scene, program, said, story, wait};
use crate::server::{Server, programs, sql};

/// A server with checksums, a role that may replicate and nothing else, and a tablespace.
fn scene() -> Scene {
    let mut scene = Scene::new();
    let dir = scene.server.data_dir().to_owned();
    let ran = |program: &str, arguments: &[&str]| {
        let output =
            Command::new(programs().join(program)).args(arguments).arg("-D").arg(&dir).output().unwrap();
        assert!(output.status.success(), "{program}: {}", said(&output));
    };
    ran("pg_ctl", &["stop", "-m", "fast"]);
    ran("pg_checksums", &["--enable", "--no-sync"]);
    // The former one would remove the directory when it is dropped; it does when this process ends.
    std::mem::forget(std::mem::replace(&mut scene.server, Server::over(dir)));
    fs::create_dir(scene.at("space")).unwrap();
    sql(&scene.server, "CREATE ROLE sender LOGIN REPLICATION");
    sql(&scene.server, &format!("CREATE TABLESPACE far LOCATION '{}'", scene.at("space")));
    sql(&scene.server, "CREATE TABLE away TABLESPACE far AS SELECT n FROM generate_series(1, 20000) n");
    let near = "CREATE TABLE near AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n; CREATE INDEX ON near (md5)";
    sql(&scene.server, near);
    sql(&scene.server, "CREATE UNLOGGED TABLE fleeting AS SELECT 1 AS n");
    scene
}

fn from(scene: &Scene, role: &str) -> String {
    format!("host=127.0.0.1 port={} user={role}", scene.server.port)
}

fn back_up(scene: &Scene, options: &[&str]) -> Value {
    let server = from(scene, "sender");
    let scratch = scene.at("scratch");
    fs::create_dir_all(&scratch).unwrap();
    let created = scene.json(
        &[&["backup", "create", "--fast", "--from-server", &server, "--scratch-dir", &scratch], options]
            .concat(),
    );
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0, "nothing is left there");
    created
}

#[test]
fn as_root_a_server_that_sends_its_files_is_backed_up_and_what_is_restored_is_what_it_had() {
    let name =
        "streamed::as_root_a_server_that_sends_its_files_is_backed_up_and_what_is_restored_is_what_it_had";
    story(name, || {
        let scene = scene();
        let first = back_up(&scene, &["--name", "shop"]);
        let backup = &first["backup"];
        assert_eq!([&backup["mode"], &backup["node"], &backup["status"]], ["full", "shop", "DONE"]);
        assert_eq!(first["damaged"], Value::Array(Vec::new()), "{first}");
        let last = scene.write(5)[4];
        sql(&scene.server, "UPDATE near SET md5 = md5 WHERE n = 25000");
        let second = back_up(&scene, &[]);
        assert_eq!(
            [&second["backup"]["mode"], &second["backup"]["parent"]],
            [&Value::from("incremental"), &backup["id"]]
        );
        let kept = second["kept_bytes"].as_u64().unwrap();
        assert!(
            kept > second["read_bytes"].as_u64().unwrap() / 2,
            "what has not changed is the parent's: {second}"
        );
        assert!(second["backup"]["stored_bytes"].as_u64() < backup["stored_bytes"].as_u64(), "{second}");
        // One that reads the directory takes the same files, and builds upon it.
        let third = scene.back_up(&[]);
        assert_eq!(third["parent"], second["backup"]["id"]);
        assert_eq!(third["files"], second["backup"]["files"], "{third} {second}");
        scene.told(&["backup", "verify"]);

        scene.archive_everything();
        let oid = sql(&scene.server, "SELECT oid FROM pg_tablespace WHERE spcname = 'far'");
        let rows = |server: &Server| {
            let sums = "SELECT (SELECT md5(string_agg(md5, '' ORDER BY n)) FROM near), (SELECT sum(n) FROM away), \
                        (SELECT count(*) FROM ledger), (SELECT count(*) FROM fleeting)";
            sql(server, sums)
        };
        for backup in [&first, &second] {
            let to = scene.at("copy");
            let space = format!("{oid}={}", scene.at("space-of-copy"));
            let id = backup["backup"]["id"].as_str().unwrap();
            scene.told(&["restore", "--to", &to, "--backup", id, "--tablespace", &space]);
            let copy = Server::over(PathBuf::from(&to));
            wait("recovery ends", || sql(&copy, "SELECT pg_is_in_recovery()") == "f");
            let wanted = rows(&scene.server);
            let wanted = wanted.strip_suffix("|1").unwrap();
            assert_eq!(rows(&copy), format!("{wanted}|0"), "an unlogged table comes back empty");
            assert_eq!(sql(&copy, "SELECT max(xid) FROM ledger"), last.to_string());
            let amcheck = Command::new(programs().join("pg_amcheck"))
                .args(["--install-missing", "--heapallindexed", "-h", "127.0.0.1", "-U", "postgres"])
                .args(["-p", &copy.port.to_string(), "postgres"])
                .output()
                .unwrap();
            assert!(amcheck.status.success(), "{}", said(&amcheck));
            let stop =
                Command::new(programs().join("pg_ctl")).args(["stop", "-m", "fast", "-D", &to]).output();
            assert!(stop.unwrap().status.success());
            let pages =
                Command::new(programs().join("pg_checksums")).args(["--check", "-D", &to]).output().unwrap();
            assert!(pages.status.success(), "{}", said(&pages));
            drop(copy);
            fs::remove_dir_all(scene.at("space-of-copy")).unwrap();
        }
    });
}

#[test]
fn as_root_what_the_server_does_not_send_whole_is_no_backup() {
    story("streamed::as_root_what_the_server_does_not_send_whole_is_no_backup", || {
        let scene = scene();
        sql(&scene.server, "CREATE ROLE reader LOGIN");
        sql(&scene.server, "CREATE TABLE filler AS SELECT n, md5(n::text) FROM generate_series(1, 300000) n");
        let create = |server: &str| scene.refused(&["backup", "create", "--fast", "--from-server", server]);
        for (server, told) in [
            (from(&scene, "reader"), "ALTER ROLE"),
            (from(&scene, "nobody"), "pg_hba.conf"),
            ("host=127.0.0.1 port=1".to_owned(), "cannot be reached"),
            ("host=db1.example".to_owned(), "sslmode=disable sends everything in clear"),
            ("host=127.0.0.1 password=x".to_owned(), "PGPASSWORD"),
        ] {
            let (exit, said) = create(&server);
            assert!(exit != 0 && said.contains(told) && said.contains("hint"), "{server}: {exit} {said}");
        }
        assert_eq!(statuses(&scene), Vec::<String>::new());

        // The server ends the stream in the middle.
        let server = from(&scene, "sender");
        let mut taking = program()
            .args(["backup", "create", "--fast", "--max-rate", "4", "--from-server", &server])
            .args(["--repository", &scene.repository])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait("it has begun", || {
            assert!(taking.try_wait().unwrap().is_none(), "it was too fast to be cut off");
            statuses(&scene) == ["STARTED"]
        });
        sql(&scene.server, "SELECT pg_terminate_backend(pid) FROM pg_stat_replication");
        let ended = taking.wait().unwrap();
        let mut told = String::new();
        taking.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        assert!(!ended.success() && told.contains("hint"), "{told}");
        assert!(told.contains("ended the connection") || told.contains("57P01"), "{told}");
        assert_eq!(statuses(&scene), ["STARTED"]);
        let (_, refused) = scene.refused(&["restore", "--to", &scene.at("copy")]);
        assert!(refused.contains("there is no base backup"), "{refused}");
        let next = back_up(&scene, &[]);
        assert_eq!(next["backup"]["mode"], "full", "what was not completed is nobody's parent");

        // A page rots on the server's disk.
        sql(&scene.server, "CHECKPOINT");
        let path = sql(&scene.server, "SELECT pg_relation_filepath('filler')");
        let file =
            fs::File::options().read(true).write(true).open(scene.server.data_dir().join(&path)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 3 * 8192 + 5000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 3 * 8192 + 5000).unwrap();
        let damaged = back_up(&scene, &[]);
        assert_eq!(damaged["damaged"], serde_json::json!([{ "path": path, "pages": [3] }]));
        std::io::stdout().flush().unwrap();

        // Nothing archives: there is no backup without its WAL.
        sql(&scene.server, "ALTER SYSTEM SET archive_command = '/bin/false'");
        sql(&scene.server, "SELECT pg_reload_conf()");
        let arguments = ["backup", "create", "--fast", "--wal-timeout", "2s", "--from-server", &server];
        let (exit, said) = scene.refused(&arguments);
        assert!(exit != 0 && said.contains("archive_command = 'pgherd wal push"), "{said}");
    });
}

fn statuses(scene: &Scene) -> Vec<String> {
    let listed = scene.call(&["backup", "list", "--json"]);
    if !listed.status.success() {
        return Vec::new();
    }
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    let backups = listed["backups"].as_array().unwrap().iter();
    backups.map(|backup| backup["status"].as_str().unwrap().to_owned()).collect()
}
