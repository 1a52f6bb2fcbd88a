//! Backups that pgBackRest and Barman have taken, restored by this program: what was there is there, and nothing of theirs is touched.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::repository::{program, said, story, wait, write};
use crate::server::{Server, programs, sql};

/// A server with a table of its transactions and another one in a tablespace.
struct Scene {
    place: tempfile::TempDir,
    server: Server,
}

impl Scene {
    fn new() -> Scene {
        let place = tempfile::tempdir().unwrap();
        let server = Server::start();
        fs::create_dir(place.path().join("space")).unwrap();
        let scene = Scene { place, server };
        sql(&scene.server, &format!("CREATE TABLESPACE far LOCATION '{}'", scene.at("space")));
        sql(&scene.server, "CREATE TABLE ledger (n serial PRIMARY KEY, xid bigint)");
        sql(&scene.server, "CREATE TABLE away TABLESPACE far AS SELECT n FROM generate_series(1, 20000) n");
        sql(&scene.server, "CREATE TABLE near AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n");
        scene
    }

    fn at(&self, name: &str) -> String {
        self.place.path().join(name).display().to_string()
    }

    fn archive_by(&mut self, command: &str) {
        let command = command.replace('\'', "''");
        self.server.kill_and_start(&format!("archive_mode = on\narchive_command = '{command}'\n"));
    }

    fn write(&self, count: usize) -> Vec<u64> {
        (0..count).map(|_| write(&self.server)).collect()
    }

    fn archive_everything(&self) {
        let last = sql(&self.server, "SELECT pg_walfile_name(pg_switch_wal())");
        wait("everything is archived", || {
            sql(&self.server, "SELECT last_archived_wal FROM pg_stat_archiver") >= last
        });
    }

    /// Where a table is: in its own tablespace, which is here.
    fn oid(&self) -> String {
        sql(&self.server, "SELECT oid FROM pg_tablespace WHERE spcname = 'far'")
    }
}

/// What is in a directory, by paths: that nothing in it was touched.
fn picture(dir: &str) -> BTreeMap<PathBuf, (u64, i64, i64, u64)> {
    let (mut found, mut open) = (BTreeMap::new(), vec![PathBuf::from(dir)]);
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let seen = fs::symlink_metadata(&path).unwrap();
            found.insert(path.clone(), (seen.size(), seen.mtime(), seen.mtime_nsec(), seen.ino()));
            if seen.is_dir() {
                open.push(path);
            }
        }
    }
    found
}

/// A restore from a place of another program, into a directory of the scene.
struct Restoring<'a> {
    scene: &'a Scene,
    from: Vec<String>,
}

impl Restoring<'_> {
    fn call(&self, to: &str, options: &[&str]) -> Output {
        let space = format!("{}={}", self.scene.oid(), self.scene.at("space-of-copy"));
        let mut command = program();
        command.arg("restore").args(&self.from).args(["--to", to, "--tablespace", &space]);
        command.args(options).stdin(Stdio::null()).output().unwrap()
    }

    #[track_caller]
    fn refused(&self, options: &[&str]) -> (i32, String) {
        let to = self.scene.at("refused");
        let output = self.call(&to, options);
        assert!(!output.status.success(), "{options:?} was done: {}", said(&output));
        (output.status.code().unwrap(), said(&output))
    }

    /// Restores, recovers, and compares with the plan; returns the last transaction.
    #[track_caller]
    fn recovered(&self, options: &[&str]) -> u64 {
        let to = self.scene.at("copy");
        let output = self.call(&to, &[&["--json"], options].concat());
        assert!(output.status.success(), "{options:?}: {}", said(&output));
        let restored: Value = serde_json::from_slice(&output.stdout).unwrap();
        let plan = &restored["plan"];
        let server = Server::over(PathBuf::from(&to));
        wait("recovery ends", || sql(&server, "SELECT pg_is_in_recovery()") == "f");
        let last = sql(&server, "SELECT coalesce(max(xid), 0) FROM ledger").parse().unwrap();
        if let Some(planned) = plan["end"]["last"]["xid"].as_u64() {
            assert_eq!(last, planned, "{options:?}: {plan}");
        }
        if let Some(next) = plan["end"]["next"]["xid"].as_u64() {
            let there = sql(&server, &format!("SELECT count(*) FROM ledger WHERE xid = {next}"));
            assert_eq!(there, "0", "{options:?}: {plan}");
        }
        assert_eq!(
            sql(&server, "SHOW archive_mode"),
            "off",
            "a copy does not archive into the original's place"
        );
        assert_eq!(sql(&server, "SELECT sum(n), count(*) FROM away"), "200010000|20000", "{options:?}");
        let whole = "SELECT count(*) FROM near WHERE md5 = md5(n::text)";
        assert_eq!(sql(&server, whole), "50000", "{options:?}");
        let away =
            sql(&server, "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'far'");
        assert_eq!(away, self.scene.at("space-of-copy"), "the original's tablespace is the original's");
        let amcheck = Command::new(programs().join("pg_amcheck"))
            .args(["--install-missing", "--heapallindexed", "-h", "127.0.0.1", "-U", "postgres"])
            .args(["-p", &server.port.to_string(), "postgres"])
            .output()
            .unwrap();
        assert!(amcheck.status.success(), "{options:?}: {}", said(&amcheck));
        drop(server);
        fs::remove_dir_all(self.scene.at("space-of-copy")).unwrap();
        last
    }

    /// Exit code of `wal fetch` in a directory that was restored.
    fn fetched(&self, data_dir: &str, name: &str) -> i32 {
        let mut command = program();
        command.args(["wal", "fetch"]).args(&self.from).args([
            "--data-dir",
            data_dir,
            "--no-ahead",
            name,
            "FETCHED",
        ]);
        command.output().unwrap().status.code().unwrap()
    }
}

/// A repository of pgBackRest for the scene's server.
struct PgBackRest {
    config: String,
    repository: String,
}

impl PgBackRest {
    fn new(scene: &mut Scene, name: &str, options: &str) -> PgBackRest {
        let (repository, config) = (scene.at(name), scene.at(&format!("{name}.conf")));
        for dir in [&repository, &scene.at("log"), &scene.at("lock")] {
            fs::create_dir_all(dir).unwrap();
        }
        let text = format!(
            "[global]\nrepo1-path={repository}\nrepo1-retention-full=9\nlog-path={}\nlock-path={}\nstart-fast=y\n\
             log-level-file=off\nlog-level-stderr=error\nlog-level-console=error\n{options}\n\
             [main]\npg1-path={}\npg1-port={}\npg1-user=postgres\n",
            scene.at("log"),
            scene.at("lock"),
            scene.server.data_dir().display(),
            scene.server.port
        );
        fs::write(&config, text).unwrap();
        let kept = PgBackRest { config, repository };
        scene.archive_by(&format!("pgbackrest --config={} --stanza=main archive-push %p", kept.config));
        kept.run(&["stanza-create"]);
        kept
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new("pgbackrest")
            .arg(format!("--config={}", self.config))
            .arg("--stanza=main")
            .args(arguments)
            // It knows no option for an address of its own host.
            .env("PGHOST", "127.0.0.1")
            .output()
            .expect("the tests need pgbackrest: .ci/packages test installs it");
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Takes a backup; returns what it is called.
    fn back_up(&self, kind: &str) -> String {
        self.run(&[&format!("--type={kind}"), "backup"]);
        let told: Value = serde_json::from_str(&self.run(&["--output=json", "info"])).unwrap();
        told[0]["backup"].as_array().unwrap().last().unwrap()["label"].as_str().unwrap().to_owned()
    }

    fn restoring<'a>(&self, scene: &'a Scene) -> Restoring<'a> {
        Restoring { scene, from: vec!["--from-pgbackrest".to_owned(), self.repository.clone()] }
    }
}

#[test]
fn as_root_what_pgbackrest_has_kept_is_restored_up_to_each_target() {
    let name = "foreign::as_root_what_pgbackrest_has_kept_is_restored_up_to_each_target";
    story(name, || {
        let mut scene = Scene::new();
        let kept = PgBackRest::new(&mut scene, "repo", "compress-type=gz");
        let scene = scene;
        let begun = scene.write(2);
        let full = kept.back_up("full");
        scene.write(2);
        let diff = kept.back_up("diff");
        scene.write(1);
        sql(&scene.server, "CREATE UNLOGGED TABLE gone AS SELECT 1");
        let incr = kept.back_up("incr");
        assert!(full.ends_with('F') && diff.ends_with('D') && incr.ends_with('I'), "{full} {diff} {incr}");
        // pgBackRest counts seconds, and a backup is used for what is behind the one in which it ended.
        let second = || sql(&scene.server, "SELECT floor(extract(epoch FROM clock_timestamp()))::bigint");
        let ended = second();
        wait("a second is over", || second() > ended);
        let good = scene.write(3);
        let moment = sql(&scene.server, "SELECT clock_timestamp() AT TIME ZONE 'UTC' || ' UTC'");
        let bad = scene.write(2);
        scene.archive_everything();
        let before = picture(&kept.repository);
        let restoring = kept.restoring(&scene);

        // The plan of a dry run has everything, and touches nothing.
        let dry = restoring.call(&scene.at("dry"), &["--dry-run", "--target-time", &moment]);
        let plan = String::from_utf8(dry.stdout.clone()).unwrap();
        assert!(dry.status.success() && plan.contains(&incr), "{plan}{}", said(&dry));
        assert!(plan.contains(&format!("transaction {},", good[2])), "{plan}");
        assert!(plan.contains(&format!("transaction {},", bad[0])), "{plan}");
        assert!(plan.contains("compared with its SHA-1"), "{plan}");
        assert!(plan.contains("archive_command is taken out"), "{plan}");
        assert!(!fs::exists(scene.at("dry")).unwrap());

        let promote = ["--target-action", "promote"];
        let up_to = |options: &[&str]| restoring.recovered(&[options, &promote].concat());
        assert_eq!(up_to(&["--target-time", &moment]), good[2]);
        assert_eq!(up_to(&["--target-xid", &good[1].to_string(), "--exclusive", "--backup", &full]), good[0]);
        assert_eq!(up_to(&["--target-immediate", "--backup", "first"]), begun[1]);
        assert_eq!(up_to(&["--target-xid", &bad[0].to_string(), "--backup", &diff]), bad[0]);
        assert_eq!(restoring.recovered(&["--stanza", "main"]), bad[1]);

        let before_all = "2001-01-01 00:00+00";
        let first_lsn = "0/1000028";
        for (options, code, words) in [
            (&["--target-time", before_all][..], 3, full.as_str()),
            (&["--target-lsn", first_lsn], 3, "before the first moment that can be restored"),
            (&["--target-time", "2099-01-01 00:00+00"], 3, "is not reached: WAL is there up to"),
            (&["--target-name", "nowhere"], 3, "is not in the WAL"),
            (&["--target-timeline", "7"], 3, "there is no timeline 7"),
            (&["--backup", "yesterday"], 3, "there is no backup yesterday"),
            (&["--backup", "../../../etc"], 3, "there is no backup"),
            (&["--stanza", "other"], 3, "has nothing of a stanza \"other\""),
            (&["--stanza", "../main"], 3, "has nothing of a stanza"),
            (&["--cluster-system", "17"], 3, "has no backup of cluster 17"),
            (&["--tablespace", "77=/nowhere"], 3, "has no tablespace 77"),
            (&["--repository", "x"], 2, "cannot be used with"),
            (&["--server", "x"], 2, "cannot be used with"),
            (&["--before-drop", "orders"], 2, "read a repository of pgherd"),
        ] {
            let (exit, text) = restoring.refused(options);
            assert!(text.contains(words) && exit == code, "{options:?}: {exit} {text}");
        }
        let nowhere =
            Restoring { scene: &scene, from: vec!["--from-pgbackrest".to_owned(), scene.at("log")] };
        let (exit, text) = nowhere.refused(&[]);
        assert!(exit == 3 && text.contains("no place of pgBackRest's") && text.contains("hint:"), "{text}");
        assert!(!fs::exists(scene.at("refused")).unwrap(), "what is refused touches nothing");
        assert!(before == picture(&kept.repository), "nothing is written there, and nothing is removed");
    });
}

#[test]
fn as_root_what_is_damaged_or_missing_with_pgbackrest_is_found() {
    let name = "foreign::as_root_what_is_damaged_or_missing_with_pgbackrest_is_found";
    story(name, || {
        let mut scene = Scene::new();
        let kept = PgBackRest::new(&mut scene, "repo", "compress-type=none");
        let scene = scene;
        let full = kept.back_up("full");
        let last = scene.write(2)[1];
        let incr = kept.back_up("incr");
        scene.archive_everything();
        let restoring = kept.restoring(&scene);
        let backups = Path::new(&kept.repository).join("backup/main");
        let node = sql(&scene.server, "SELECT pg_relation_filepath('near')");
        let file = backups.join(&full).join("pg_data").join(&node);
        let whole = fs::read(&file).unwrap();

        // A byte: only its checksum tells, and it is the full backup's that an incremental one refers to.
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        fs::write(&file, &damaged).unwrap();
        let to = scene.at("copy");
        let output = restoring.call(&to, &[]);
        let text = said(&output);
        assert!(output.status.code() == Some(1) && text.contains("SHA-1") && text.contains(&node), "{text}");
        assert!(text.contains("--delta goes on with it"), "{text}");
        assert!(!fs::exists(scene.at("copy/global/pg_control")).unwrap(), "it does not start");
        // What is cut off is found before anything is written.
        fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        let (exit, text) = restoring.refused(&[]);
        assert!(exit == 1 && text.contains("bytes and should have") && text.contains(&node), "{exit} {text}");
        fs::remove_file(&file).unwrap();
        let (exit, text) = restoring.refused(&[]);
        assert!(exit == 1 && text.contains(&node), "{exit} {text}");
        // No link is followed, wherever it leads.
        let away = scene.at("away");
        fs::write(&away, &whole).unwrap();
        std::os::unix::fs::symlink(&away, &file).unwrap();
        let (exit, text) = restoring.refused(&[]);
        assert!(exit == 1 && text.contains("it is no file"), "{exit} {text}");
        assert!(!fs::exists(scene.at("refused")).unwrap());

        // A backup that another one refers to.
        let (moved, there) = (backups.join("moved"), backups.join(&full));
        fs::rename(&there, &moved).unwrap();
        let (exit, text) = restoring.refused(&["--backup", &incr]);
        assert!(
            exit == 3 && text.contains(&format!("files in backup {full}, which is not there")),
            "{exit} {text}"
        );
        assert!(!fs::exists(scene.at("refused")).unwrap());
        fs::rename(&moved, &there).unwrap();

        // A manifest with another byte is not believed; its copy is, while it is whole.
        let manifest = backups.join(&incr).join("backup.manifest");
        let text = fs::read_to_string(&manifest).unwrap();
        fs::write(&manifest, text.replacen("\"size\":8192", "\"size\":8193", 1)).unwrap();
        fs::remove_file(&file).unwrap();
        fs::write(&file, &whole).unwrap();
        // On with what was interrupted: what is there and right is not fetched again.
        let output = restoring.call(&to, &["--delta", "--json"]);
        assert!(output.status.success(), "{}", said(&output));
        let restored: Value = serde_json::from_slice(&output.stdout).unwrap();
        let [bytes, fetched] =
            ["bytes", "fetched_bytes"].map(|key| restored["restored"][key].as_u64().unwrap());
        assert!(fetched < bytes, "{restored}");

        // Absent is what is not there for certain; where the archive is not, nobody knows.
        let archive = Path::new(&kept.repository).join("archive/main");
        assert_eq!(restoring.fetched(&to, "0000000100000000000000FF"), 1);
        assert_eq!(restoring.fetched(&to, "00000002.history"), 1);
        fs::rename(archive.join("archive.info"), archive.join("hidden")).unwrap();
        fs::rename(archive.join("archive.info.copy"), archive.join("hidden.copy")).unwrap();
        assert_eq!(restoring.fetched(&to, "0000000100000000000000FF"), 200);
        fs::rename(archive.join("hidden"), archive.join("archive.info")).unwrap();
        let folder =
            fs::read_dir(&archive).unwrap().flatten().find(|entry| entry.path().is_dir()).unwrap().path();
        let folder = folder.join("0000000100000000");
        let first = fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.path());
        let segment = first.filter(|path| path.extension().is_none()).max().unwrap();
        let name = segment.file_name().unwrap().to_str().unwrap()[..24].to_owned();
        assert_eq!(restoring.fetched(&to, &name), 0);
        assert_eq!(fs::read(scene.at("copy/FETCHED")).unwrap(), fs::read(&segment).unwrap());
        let content = fs::read(&segment).unwrap();
        let mut other = content.clone();
        other[100_000] ^= 1;
        fs::write(&segment, &other).unwrap();
        assert_eq!(restoring.fetched(&to, &name), 200, "a damaged segment is not its end");
        fs::write(&segment, &content).unwrap();
        let twin = folder.join(format!("{name}-{}", "0".repeat(40)));
        fs::write(&twin, &content).unwrap();
        assert_eq!(restoring.fetched(&to, &name), 200, "of two nobody knows which one it is");
        fs::remove_file(&twin).unwrap();

        let server = Server::over(PathBuf::from(&to));
        wait("recovery ends", || sql(&server, "SELECT pg_is_in_recovery()") == "f");
        assert_eq!(sql(&server, "SELECT max(xid) FROM ledger"), last.to_string());
        assert_eq!(sql(&server, "SELECT count(*) FROM near"), "50000");
    });
}

#[test]
fn as_root_bundles_and_each_compression_of_pgbackrest_are_read_and_the_rest_is_refused_by_name() {
    let name = "foreign::as_root_bundles_and_each_compression_of_pgbackrest_are_read_and_the_rest_is_refused_by_name";
    story(name, || {
        let mut scene = Scene::new();
        for (name, options) in [
            ("zst", "compress-type=zst\nrepo1-bundle=y"),
            ("gz", "compress-type=gz\nrepo1-bundle=y"),
            ("lz4", "compress-type=lz4"),
            ("bz2", "compress-type=bz2\ncompress-level=1"),
        ] {
            let kept = PgBackRest::new(&mut scene, name, options);
            kept.back_up("full");
            let last = scene.write(2)[1];
            kept.back_up("incr");
            let later = scene.write(1)[0];
            scene.archive_everything();
            let restoring = kept.restoring(&scene);
            let at = ["--target-immediate", "--target-action", "promote"];
            assert_eq!(restoring.recovered(&at), last, "{name}");
            assert_eq!(restoring.recovered(&[]), later, "{name}");
        }
        // It became a plain option with 2.46.
        let version = Command::new("pgbackrest").arg("version").output().unwrap().stdout;
        let is_old = String::from_utf8(version).unwrap().trim() <= "pgBackRest 2.45";
        let beta = if is_old { "beta=y\n" } else { "" };
        for (name, options, words) in [
            ("blocks", format!("{beta}repo1-bundle=y\nrepo1-block=y"), "block by block (repo-block)"),
            (
                "sealed",
                "repo1-cipher-type=aes-256-cbc\nrepo1-cipher-pass=hello".to_owned(),
                "is encrypted (repo-cipher-type)",
            ),
        ] {
            let kept = PgBackRest::new(&mut scene, name, &options);
            kept.back_up("full");
            let (exit, text) = kept.restoring(&scene).refused(&[]);
            assert!(exit == 3 && text.contains(words) && text.contains("hint:"), "{name}: {exit} {text}");
            assert!(!fs::exists(scene.at("refused")).unwrap(), "{name}");
        }
    });
}

/// A server in a home of Barman's, made as its method `postgres` makes one: by `pg_basebackup`, tablespaces beside the data directory.
struct Barman {
    home: String,
}

impl Barman {
    fn new(scene: &mut Scene) -> Barman {
        let home = scene.at("barman");
        for dir in ["base", "meta", "wals", "incoming", "streaming", "errors"] {
            fs::create_dir_all(format!("{home}/main/{dir}")).unwrap();
        }
        scene.archive_by(&format!("test ! -f {home}/main/incoming/%f && cp %p {home}/main/incoming/%f"));
        Barman { home }
    }

    /// `id` is a time; `old`: its catalogue is where it was before Barman 3.13, and its files are not in a manifest, as rsync's.
    fn back_up(&self, scene: &Scene, id: &str, old: bool) {
        let (base, oid) = (format!("{}/main/base/{id}", self.home), scene.oid());
        let output = Command::new(programs().join("pg_basebackup"))
            .args(["-h", "127.0.0.1", "-U", "postgres", "-p", &scene.server.port.to_string()])
            .args([
                "-D",
                &format!("{base}/data"),
                "-X",
                "none",
                "-c",
                "fast",
                "--no-sync",
                "-l",
                "Barman backup",
            ])
            .args(["-T", &format!("{}={base}/{oid}", scene.at("space"))])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let label = fs::read_to_string(format!("{base}/data/backup_label")).unwrap();
        let start = label.split_once("START WAL LOCATION: ").unwrap().1.split_once(' ').unwrap().0.to_owned();
        let segment = label.split_once("(file ").unwrap().1.split_once(')').unwrap().0.to_owned();
        let system = sql(&scene.server, "SELECT system_identifier FROM pg_control_system()");
        let version = sql(&scene.server, "SHOW server_version_num");
        let now = sql(&scene.server, "SELECT clock_timestamp() AT TIME ZONE 'UTC'");
        // That of the next segment: Barman knows no better.
        let end = sql(
            &scene.server,
            "SELECT '0/'::text || to_hex(((pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint / 16777216 + 1) * 16777216)",
        );
        let label = label.replace('\n', "\\n");
        let space = scene.at("space");
        let info = format!(
            "backup_label='{label}'\nbegin_offset=40\nbegin_wal={segment}\nbegin_xlog={start}\ncompression=None\nencryption=None\nend_time={now}+00:00\nend_xlog={end}\n\
             error=None\nmode=postgres\nparent_backup_id=None\nserver_name=main\nstatus=DONE\nsystemid={system}\n\
             tablespaces=[('far', {oid}, '{space}')]\ntimeline=1\nversion={version}\nxlog_segment_size=16777216\n"
        );
        if old {
            fs::write(format!("{base}/backup.info"), info).unwrap();
            fs::remove_file(format!("{base}/data/backup_manifest")).unwrap();
            // Barman does not copy the links either.
            fs::remove_file(format!("{base}/data/pg_tblspc/{oid}")).unwrap();
        } else {
            fs::write(format!("{}/main/meta/{id}-backup.info", self.home), info).unwrap();
        }
    }

    /// As `barman archive-wal` does: each segment into its directory, compressed.
    fn archive(&self, compress: &[&str]) {
        for entry in fs::read_dir(format!("{}/main/incoming", self.home)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let folder = if name.ends_with(".history") { "" } else { &name[..16] };
            let to = Path::new(&self.home).join("main/wals").join(folder);
            fs::create_dir_all(&to).unwrap();
            let content = fs::read(&path).unwrap();
            let content = match compress {
                [] => content,
                [program, arguments @ ..] => {
                    let mut child = Command::new(program)
                        .args(arguments)
                        .stdin(Stdio::piped())
                        .stdout(Stdio::piped())
                        .spawn()
                        .unwrap();
                    let mut stdin = child.stdin.take().unwrap();
                    let writing = std::thread::spawn(move || stdin.write_all(&content).unwrap());
                    let output = child.wait_with_output().unwrap();
                    writing.join().unwrap();
                    assert!(output.status.success(), "{}", said(&output));
                    output.stdout
                }
            };
            fs::write(to.join(&name), content).unwrap();
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn as_root_what_barman_has_kept_is_restored_up_to_each_target() {
    let name = "foreign::as_root_what_barman_has_kept_is_restored_up_to_each_target";
    story(name, || {
        let mut scene = Scene::new();
        let kept = Barman::new(&mut scene);
        let scene = scene;
        let begun = scene.write(2);
        kept.back_up(&scene, "20261120T100000", true);
        let between = scene.write(2);
        scene.archive_everything();
        kept.archive(&["gzip"]);
        kept.back_up(&scene, "20261120T110000", false);
        let good = scene.write(2);
        let moment = sql(&scene.server, "SELECT clock_timestamp() AT TIME ZONE 'UTC' || ' UTC'");
        let bad = scene.write(2);
        scene.archive_everything();
        kept.archive(&["bzip2"]);
        let last = scene.write(1)[0];
        // Not in its place yet.
        scene.archive_everything();
        let restoring =
            Restoring { scene: &scene, from: vec!["--from-barman".to_owned(), kept.home.clone()] };
        let before = picture(&kept.home);

        let dry = restoring.call(&scene.at("dry"), &["--dry-run", "--target-time", &moment]);
        let plan = String::from_utf8(dry.stdout.clone()).unwrap();
        assert!(dry.status.success() && plan.contains("20261120T110000"), "{plan}{}", said(&dry));
        assert!(plan.contains("the manifest that PostgreSQL wrote"), "{plan}");
        let old = restoring.call(&scene.at("dry"), &["--dry-run", "--backup", "first"]);
        let plan = String::from_utf8(old.stdout.clone()).unwrap();
        assert!(old.status.success() && plan.contains("Barman keeps no checksums"), "{plan}{}", said(&old));

        let promote = ["--target-action", "promote"];
        let up_to = |options: &[&str]| restoring.recovered(&[options, &promote].concat());
        assert_eq!(up_to(&["--target-time", &moment]), good[1]);
        assert_eq!(up_to(&["--target-xid", &bad[0].to_string(), "--server", "main"]), bad[0]);
        assert_eq!(
            up_to(&["--target-immediate"]),
            between[1],
            "PostgreSQL knows better than Barman where it is consistent"
        );
        assert_eq!(up_to(&["--target-immediate", "--backup", "20261120T100000"]), begun[1]);
        assert_eq!(restoring.recovered(&[]), last, "what Barman has not archived yet is there, too");

        for (options, code, words) in [
            (&["--target-time", "2001-01-01 00:00+00"][..], 3, "backup 20261120T100000 is consistent from"),
            (&["--target-time", "2099-01-01 00:00+00"], 3, "is not reached"),
            (&["--server", "../main"], 3, "has nothing of a server"),
            (&["--backup", "20261120T120000"], 3, "there is no backup 20261120T120000"),
        ] {
            let (exit, text) = restoring.refused(options);
            assert!(text.contains(words) && exit == code, "{options:?}: {exit} {text}");
        }
        let info = format!("{}/main/meta/20261120T110000-backup.info", kept.home);
        let text = fs::read_to_string(&info).unwrap();
        for (was, now, words) in [
            ("status=DONE", "status=FAILED", "its status is FAILED"),
            ("compression=None", "compression=gzip", "compressed archives (backup_compression)"),
            ("encryption=None", "encryption=gpg", "is encrypted"),
            ("parent_backup_id=None", "parent_backup_id=20261120T100000", "incremental one of PostgreSQL 17"),
        ] {
            fs::write(&info, text.replace(was, now)).unwrap();
            let (exit, said) = restoring.refused(&["--backup", "20261120T110000"]);
            assert!(exit == 3 && said.contains(words), "{now}: {exit} {said}");
        }
        fs::write(&info, &text).unwrap();
        assert!(!fs::exists(scene.at("refused")).unwrap(), "what is refused touches nothing");

        // A byte in a file of the manifest is found; a file that is missing before anything is written.
        let node = sql(&scene.server, "SELECT pg_relation_filepath('near')");
        let file = format!("{}/main/base/20261120T110000/data/{node}", kept.home);
        let whole = fs::read(&file).unwrap();
        let mut damaged = whole.clone();
        damaged[5000] ^= 1;
        fs::write(&file, &damaged).unwrap();
        let output = restoring.call(&scene.at("copy"), &[]);
        let told = said(&output);
        assert!(
            output.status.code() == Some(1) && told.contains("CRC-32C") && told.contains(&node),
            "{told}"
        );
        fs::remove_file(&file).unwrap();
        let (exit, told) = restoring.refused(&[]);
        assert!(exit == 1 && told.contains(&node), "{exit} {told}");
        fs::write(&file, &whole).unwrap();
        let output = restoring.call(&scene.at("copy"), &["--delta"]);
        assert!(output.status.success(), "{}", said(&output));

        // Absent is what is not there for certain.
        let to = scene.at("copy");
        assert_eq!(restoring.fetched(&to, "0000000100000000000000FF"), 1);
        let wals = format!("{}/main/wals", kept.home);
        fs::rename(&wals, scene.at("unmounted")).unwrap();
        assert_eq!(restoring.fetched(&to, "0000000100000000000000FF"), 200);
        fs::rename(scene.at("unmounted"), &wals).unwrap();

        // But for what this test has changed and put back itself.
        let after = picture(&kept.home);
        let differ =
            before.iter().filter(|(path, seen)| after.get(*path) != Some(seen)).map(|(path, _)| path);
        let differ: Vec<String> = differ.map(|path| path.display().to_string()).collect();
        let own = |path: &String| {
            *path == info
                || path.starts_with(file.rsplit_once('/').unwrap().0)
                || *path == format!("{}/main", kept.home)
        };
        assert!(differ.iter().all(own) && before.len() == after.len(), "{differ:?}");
    });
}
