//! WAL into an archive, out of it, and how far behind a busy server the archive is.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::Arguments;
use crate::measured::{Rounds, Run, bytes_below, family_cpu, run};
use crate::scene::{Scene, Server};
use crate::subjects::{PGBACKREST, PGHERD};

const SEGMENT_BYTES: u64 = 16 << 20;
const FLOOR_IN: &str = "pg_receivewal";
const FLOOR_OUT: &str = "cp";
const SLOTS: [&str; 2] = ["bench_pgherd", "bench_floor"];
/// Rows of text that compresses somewhat; some 16 MB of WAL.
const BATCH: &str =
    "INSERT INTO backlog SELECT n, md5(n::text) || md5((n * 7)::text) FROM generate_series(1, 130000) AS n";
/// A backlog, or the last commits, into the archive.
const ARCHIVED_WITHIN: Duration = Duration::from_secs(600);
/// Between two looks where the server is.
const LOOK: Duration = Duration::from_millis(20);
/// As a herd's archive does it by default.
const PIECES_MS: &str = "1000";

pub(crate) fn measure(scene: &Scene, arguments: &Arguments) {
    let name = "server-wal";
    scene.initdb(name);
    let server = scene.start(name, &["archive_mode=on", "max_wal_size=64GB"]);
    // What nobody archives waits, for whoever will.
    server.archive(scene, "false");
    for slot in SLOTS {
        server.sql(scene, &format!("SELECT pg_create_physical_replication_slot('{slot}', true)"));
    }
    let backlog = Backlog::make(scene, &server, arguments.wal_size);
    println!(
        "\na backlog of {} segments of WAL, {:.2} GB, {} rounds; out of the archive file by file, as recovery asks",
        backlog.files.len(),
        backlog.bytes() as f64 / 1e9,
        arguments.rounds
    );
    let mut rounds = Rounds::new(arguments.verbose);
    let peer = (!arguments.alone)
        .then(|| scene.command("pgbackrest").arg("version").output().ok())
        .flatten()
        .is_some();
    for _ in 0..arguments.rounds {
        received_by_postgresql(scene, &server, &backlog, &mut rounds);
        fetched(scene, &backlog, FLOOR_OUT, &mut rounds, |file, to| {
            let mut command = scene.command("cp");
            command.arg(server.data_dir.join("pg_wal").join(file)).arg(to);
            command
        });
        received(scene, &server, &backlog, &mut rounds);
        fetched(scene, &backlog, PGHERD, &mut rounds, |file, to| {
            let mut command = scene.command(scene.path("pgherd"));
            command.args(["wal", "fetch", "--repository"]).arg(scene.path("pgherd.toml"));
            command.current_dir(scene.path("fetching")).arg(file).arg(to);
            command
        });
        scene.remove("archive-pgherd");
        if peer {
            let config = pgbackrest(scene, &server, arguments.jobs);
            archived_by_command(scene, &server, &backlog, &config, &mut rounds);
            fetched(scene, &backlog, PGBACKREST, &mut rounds, |file, to| {
                let mut command = scene.command("pgbackrest");
                command.args([&config, "--stanza=bench", "archive-get", file]).arg(to);
                command
            });
            scene.remove("archive-pgbackrest");
        }
    }
    rounds.report(PGBACKREST, FLOOR_IN);
    for slot in SLOTS {
        server.sql(scene, &format!("SELECT pg_drop_replication_slot('{slot}')"));
    }
    behind(scene, &server, arguments.seconds);
    drop(server);
    for left in [name, "fetching", "archive-pgherd"] {
        scene.remove(left);
    }
}

/// WAL that waits.
struct Backlog {
    files: Vec<String>,
    end: String,
}

impl Backlog {
    fn make(scene: &Scene, server: &Server, mib: u64) -> Backlog {
        server.sql(scene, "CREATE TABLE backlog (n int, text text)");
        let begin = server.sql(scene, "SELECT pg_switch_wal()");
        let first = format!("SELECT pg_walfile_name('{begin}'::pg_lsn + 16777216)");
        let since = format!("SELECT (pg_current_wal_lsn() - '{begin}'::pg_lsn)::bigint");
        let mut bytes = 0;
        while bytes < mib << 20 {
            server.sql(scene, BATCH);
            bytes = server.sql(scene, &since).parse().expect("a number of bytes");
        }
        let first = server.sql(scene, &first);
        let last = server.sql(scene, "SELECT pg_walfile_name(pg_switch_wal())");
        // Where it switched to, or the end of the last segment is not the server's end.
        server.sql(scene, "INSERT INTO backlog VALUES (0, '')");
        let end = server.sql(
            scene,
            "SELECT '0/0'::pg_lsn + div(pg_current_wal_lsn() - '0/0'::pg_lsn, 16777216) * 16777216",
        );
        let mut files: Vec<String> = std::fs::read_dir(server.data_dir.join("pg_wal"))
            .expect("the server has WAL")
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|file| file.len() == 24 && (&first..=&last).contains(&file))
            .collect();
        files.sort();
        Backlog { files, end }
    }

    fn bytes(&self) -> u64 {
        self.files.len() as u64 * SEGMENT_BYTES
    }

    fn rate(&self, seconds: f64) -> f64 {
        self.bytes() as f64 / 1e6 / seconds
    }
}

fn add(rounds: &mut Rounds, mode: &'static str, who: &'static str, backlog: &Backlog, run: Run) {
    println!("{mode:<13}{who:<22}{:>8.0} MB/s", backlog.rate(run.seconds));
    rounds.add(mode, who, run);
}

/// The floor: files as they are, flushed.
fn received_by_postgresql(scene: &Scene, server: &Server, backlog: &Backlog, rounds: &mut Rounds) {
    let to = scene.fresh("received");
    let mut command = server.at(scene.command(scene.program("pg_receivewal")));
    command.args(["--no-loop", "--synchronous", "--endpos", &backlog.end, "-D"]).arg(&to);
    command.args(["--slot", SLOTS[1]]);
    // It reports, and a slot does not go back.
    server.sql(scene, &format!("SELECT pg_drop_replication_slot('{}')", SLOTS[1]));
    server.sql(scene, &format!("SELECT pg_copy_physical_replication_slot('{}', '{}')", SLOTS[0], SLOTS[1]));
    scene.settle();
    let mut taken = run("pg_receivewal", command, Some(server.pid()));
    taken.stored_bytes = bytes_below(&to);
    add(rounds, "WAL received", FLOOR_IN, backlog, taken);
    scene.remove("received");
}

fn received(scene: &Scene, server: &Server, backlog: &Backlog, rounds: &mut Rounds) {
    let archive = repository(scene);
    // Its own slot stays where it is for the next round.
    let slot = "bench_round";
    server.sql(scene, &format!("SELECT pg_copy_physical_replication_slot('{}', '{slot}')", SLOTS[0]));
    scene.settle();
    let command = receiver(scene, server, slot, &[&backlog.end]);
    let mut taken = run("receive_wal", command, Some(server.pid()));
    taken.stored_bytes = bytes_below(&archive);
    add(rounds, "WAL received", PGHERD, backlog, taken);
    dropped(scene, server, slot);
}

/// A server notices some moments later that nobody listens.
fn dropped(scene: &Scene, server: &Server, slot: &str) {
    let began = Instant::now();
    let is_free = format!("SELECT NOT active FROM pg_replication_slots WHERE slot_name = '{slot}'");
    while server.sql(scene, &is_free) != "t" {
        assert!(began.elapsed() < ARCHIVED_WITHIN, "slot {slot} is in use for ever");
        // sleep: between two looks.
        std::thread::sleep(LOOK);
    }
    server.sql(scene, &format!("SELECT pg_drop_replication_slot('{slot}')"));
}

fn repository(scene: &Scene) -> std::path::PathBuf {
    let archive = scene.fresh("archive-pgherd");
    let text = format!("repository = \"file://{}\"\n", archive.display());
    let file = scene.write("pgherd.toml", &text);
    let mut init = scene.command(scene.path("pgherd"));
    init.args(["backup", "init", "--repository"]).arg(file);
    scene.done("pgherd backup init", init);
    archive
}

fn receiver(scene: &Scene, server: &Server, slot: &str, more: &[&str]) -> Command {
    let system = server.sql(scene, "SELECT system_identifier FROM pg_control_system()");
    let mut command = scene.command(scene.path("receive_wal"));
    command.arg(server.socket_dir.join(format!(".s.PGSQL.{}", server.port)));
    command.arg(slot).arg(scene.path("pgherd.toml")).arg(system).args(more);
    command
}

/// An empty archive; the option that names its configuration.
fn pgbackrest(scene: &Scene, server: &Server, jobs: u32) -> String {
    let home = scene.fresh("archive-pgbackrest");
    let file = scene.write(
        "pgbackrest.conf",
        &format!(
            "[global]\nrepo1-path={home}\ncompress-type=zst\ncompress-level=3\nprocess-max={jobs}\nlog-level-console=warn\n\
             log-level-file=off\nlock-path={home}/lock\nlog-path={home}\nspool-path={home}/spool\narchive-async=y\n\
             archive-get-queue-max=256MB\narchive-push-queue-max=64GB\n[bench]\npg1-path={}\npg1-socket-path={}\npg1-port={}\npg1-user=postgres\n",
            server.data_dir.display(),
            server.socket_dir.display(),
            server.port,
            home = home.display(),
        ),
    );
    let config = format!("--config={}", file.display());
    let mut create = scene.command("pgbackrest");
    create.args([&config, "--stanza=bench", "stanza-create"]);
    scene.done("pgbackrest stanza-create", create);
    config
}

/// What waits is archived by `archive_command`, until the last of it is.
fn archived_by_command(scene: &Scene, server: &Server, backlog: &Backlog, config: &str, rounds: &mut Rounds) {
    let ready = server.data_dir.join("pg_wal/archive_status");
    // Once more for each round.
    for file in &backlog.files {
        let (from, to) = (ready.join(format!("{file}.done")), ready.join(format!("{file}.ready")));
        if from.exists() {
            std::fs::rename(from, to).expect("the directory is ours");
        }
    }
    scene.settle();
    let before = family_cpu(server.pid());
    let began = Instant::now();
    server.set(scene, "archive_command", &format!("pgbackrest {config} --stanza=bench archive-push %p"));
    server.sql(scene, "SELECT pg_switch_wal()");
    let last = backlog.files.last().expect("there is a backlog");
    let done = ready.join(format!("{last}.done"));
    while !done.exists() {
        assert!(began.elapsed() < ARCHIVED_WITHIN, "pgbackrest does not archive: server-wal.log");
        // sleep: between two looks.
        std::thread::sleep(LOOK);
    }
    let seconds = began.elapsed().as_secs_f64();
    let server_cpu = family_cpu(server.pid()) - before;
    server.set(scene, "archive_command", "false");
    let stored_bytes = bytes_below(&scene.path("archive-pgbackrest/archive"));
    let taken = Run { seconds, server_cpu, stored_bytes, ..Run::default() };
    add(rounds, "WAL received", PGBACKREST, backlog, taken);
}

/// One file after the other, each thrown away as soon as it is there. Processes that a command leaves behind are not in its CPU.
fn fetched(
    scene: &Scene,
    backlog: &Backlog,
    who: &'static str,
    rounds: &mut Rounds,
    command: impl Fn(&str, &Path) -> Command,
) {
    // Which cluster it is says its control file.
    let into = scene.fresh("fetching");
    let mut copy = scene.command("cp");
    copy.arg("-r").arg(scene.path("server-wal/global")).arg(scene.path("server-wal/PG_VERSION")).arg(&into);
    scene.done("cp", copy);
    scene.settle();
    let began = Instant::now();
    let to = into.join("RECOVERYXLOG");
    for file in &backlog.files {
        let done = command(file, &to).status().expect("the command starts");
        assert!(done.success(), "{who} does not fetch {file}: {done}");
        let there = std::fs::metadata(&to).expect("it was fetched").len();
        assert_eq!(there, SEGMENT_BYTES, "{who} fetched another {file}");
        std::fs::remove_file(&to).expect("the file is ours");
    }
    let run = Run { seconds: began.elapsed().as_secs_f64(), ..Run::default() };
    add(rounds, "WAL fetched", who, backlog, run);
}

/// How long after a commit its WAL is in the archive, while pgbench runs.
fn behind(scene: &Scene, server: &Server, seconds: u32) {
    let mut pgbench = server.at(scene.command(scene.program("pgbench")));
    pgbench.args(["-i", "-q", "-s", "10"]);
    scene.done("pgbench -i", pgbench);
    repository(scene);
    // A slot keeps WAL from the last checkpoint on.
    server.sql(scene, "CHECKPOINT");
    let slot = "bench_behind";
    server.sql(scene, &format!("SELECT pg_create_physical_replication_slot('{slot}', true)"));
    let mut command = receiver(scene, server, slot, &["-", PIECES_MS]);
    let mut receiving = command.stdout(Stdio::piped()).spawn().expect("receive_wal starts");
    let lines = BufReader::new(receiving.stdout.take().expect("stdout is a pipe")).lines();
    let (durable, is_over) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let flushed = std::thread::scope(|scope| {
        scope.spawn(|| {
            for line in lines.map_while(Result::ok) {
                if let Some(position) = line.strip_prefix("durable ").and_then(position) {
                    durable.lock().expect("nobody panics").push((Instant::now(), position));
                }
            }
        });
        let looking = scope.spawn(|| flushed(server, &is_over));
        let said = server.change(scene, seconds);
        is_over.store(true, Ordering::Relaxed);
        let rate = said.lines().find(|line| line.starts_with("tps")).unwrap_or("tps = ?");
        println!("\ncommit to durable in the archive, {seconds} s of pgbench -N, {rate}");
        let flushed = looking.join().expect("no panic");
        let last = flushed.last().map_or(0, |(_, position)| *position);
        let began = Instant::now();
        while durable.lock().expect("nobody panics").last().is_none_or(|(_, position)| *position < last) {
            assert!(began.elapsed() < ARCHIVED_WITHIN, "the archive does not come up to the end");
            // sleep: between two looks.
            std::thread::sleep(LOOK);
        }
        receiving.kill().expect("it runs");
        receiving.wait().expect("it was started");
        flushed
    });
    let durable = durable.into_inner().expect("nobody panics");
    let mut delays: Vec<f64> = flushed
        .iter()
        .filter_map(|(at, position)| {
            let first = durable.partition_point(|(_, durable)| durable < position);
            Some(durable.get(first)?.0.saturating_duration_since(*at).as_secs_f64())
        })
        .collect();
    delays.sort_by(f64::total_cmp);
    let of = |part: usize| delays[(delays.len() - 1) * part / 100];
    println!(
        "{} moments: median {:.2} s, 99 % {:.2} s, worst {:.2} s",
        delays.len(),
        of(50),
        of(99),
        of(100)
    );
    dropped(scene, server, slot);
}

/// When WAL was flushed up to where.
fn flushed(server: &Server, is_over: &AtomicBool) -> Vec<(Instant, u64)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", server.port);
    runtime.block_on(async {
        let (client, connection) =
            tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.expect("it lets us in");
        tokio::spawn(connection);
        let mut seen = Vec::new();
        while !is_over.load(Ordering::Relaxed) {
            let row =
                client.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.expect("it answers");
            if let Some(position) = position(row.get(0)) {
                seen.push((Instant::now(), position));
            }
            // sleep: between two looks.
            tokio::time::sleep(LOOK).await;
        }
        seen
    })
}

fn position(text: &str) -> Option<u64> {
    let (high, low) = text.trim().split_once('/')?;
    Some(u64::from_str_radix(high, 16).ok()? << 32 | u64::from_str_radix(low, 16).ok()?)
}
