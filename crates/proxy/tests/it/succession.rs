//! Processes of one proxy that take over from each other, with clients that must not notice.
//!
//! Each process is this test's own program, started again: [`a_process_of_a_proxy`].

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant as Moment};

use pgherd_core::types::{Instant, Term};
use pgherd_proxy::routes::{Table, Target};
use pgherd_proxy::succession::{Place, Standing, Succession, Turn};
use pgherd_proxy::{Access, AuthQuery, Config, InClear, Proxy};
use tokio_postgres::{Client, NoTls};

use crate::harness::{
    PASSWORD, SOON, Scene, connect, connect_and_watch, last_word, one, settings, story, told,
};

/// What a process is told: its directory, how it begins, and the server's port.
const DIR: &str = "PGHERD_TEST_PROXY_DIR";
const HOW: &str = "PGHERD_TEST_PROXY_HOW";
const SERVER: &str = "PGHERD_TEST_PROXY_SERVER";

/// Not a test, but what the tests below start: a proxy that says how far it is, a line at a time, and does nothing without being
/// told so. When whoever started it is gone, it is gone, too.
#[test]
fn a_process_of_a_proxy() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let outcome = runtime.block_on(be_a_process(Path::new(&dir)));
    say(&outcome.unwrap_or_else(|error| format!("error {error}")));
    std::process::exit(0);
}

/// To whoever has started this process.
fn say(line: &str) {
    let mut output = std::io::stdout();
    writeln!(output, "{line}").and_then(|()| output.flush()).unwrap();
}

async fn be_a_process(dir: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let (how, port) = (std::env::var(HOW)?, std::env::var(SERVER)?.parse()?);
    let (told, mut words) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if told.send(line).is_err() {
                return;
            }
        }
        std::process::exit(1);
    });
    let turn = Turn::wait(Place::open(dir)?).await?;
    let listen = [Access::ReadWrite, Access::ReadOnly]
        .map(|access| (SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0), access));
    let config = Config {
        listen: listen.to_vec(),
        workers: 2,
        server_tls: Arc::new(InClear),
        auth_query: AuthQuery {
            user: "pgherd_proxy".to_owned(),
            database: "postgres".to_owned(),
            secret_of: None,
        },
    };
    let (proxy, heritage) = if how == "takes over" {
        let mut heritage = turn.inherit().await?;
        let inherited = std::mem::take(&mut heritage.listeners);
        (Proxy::succeed(config, settings(), inherited)?, Some(heritage))
    } else {
        turn.must_be_alone().await?;
        (Proxy::start(config, settings())?, None)
    };
    let proxy = Arc::new(proxy);
    let node = "a".parse()?;
    let target = Target { node, address: Ipv4Addr::LOCALHOST.into(), port, socket_dir: None };
    proxy.learn(Table {
        term: Term(1),
        primary: Some(target),
        gate_open: true,
        standbys: Vec::new(),
        forks: Vec::new(),
        draining: None,
        valid_until: Instant::from_boot(Duration::from_secs(u64::from(u32::MAX))),
    });
    say(&format!("prepared {}", proxy.addresses()[0].port()));
    words.recv().await;
    let succession = Succession::begin(turn, heritage, &proxy, Vec::new(), None).await?;
    say("accepts");
    let mut standing = succession.standing();
    tokio::select! {
        over = standing.wait_for(|standing| *standing == Standing::Over) => drop(over?),
        _ = words.recv() => {
            succession.leave().await;
            proxy.finish(pgherd_proxy::Ending::AfterServers { within: Some(Duration::from_secs(5)) }).await;
        }
    }
    Ok("over".to_owned())
}

struct Process {
    child: Child,
    words: ChildStdin,
    lines: Receiver<String>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Process {
    fn start(scene: &Scene, dir: &Path, how: &str) -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "succession::a_process_of_a_proxy", "--nocapture"])
            .env(DIR, dir)
            .env(HOW, how)
            .env(SERVER, scene.server.port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (words, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (line, lines) = channel();
        std::thread::spawn(move || {
            for said in BufReader::new(output).lines().map_while(Result::ok) {
                if line.send(said).is_err() {
                    return;
                }
            }
        });
        Process { child, words, lines }
    }

    /// What it says that begins with this; what the harness of tests says is passed over.
    fn says(&self, what: &str) -> String {
        let until = Moment::now() + SOON;
        loop {
            let left = until.saturating_duration_since(Moment::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("it does not say: {what}"));
            match line.find(what) {
                Some(at) => return line[at + what.len()..].trim().to_owned(),
                None => assert!(!line.contains("error "), "{line}"),
            }
        }
    }

    fn go_on(&mut self) {
        self.words.write_all(b"go on\n").unwrap();
    }

    /// The port that leads to the primary.
    fn prepared(&self) -> u16 {
        self.says("prepared ").parse().unwrap()
    }

    /// A process that accepts, and where.
    fn accepting(scene: &Scene, dir: &Path, how: &str) -> (Process, u16) {
        let mut process = Process::start(scene, dir, how);
        let port = process.prepared();
        process.go_on();
        process.says("accepts");
        (process, port)
    }

    fn ends(mut self) -> ExitStatus {
        self.says("over");
        self.child.wait().unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn conninfo(port: u16, user: &str) -> String {
    format!("host=127.0.0.1 port={port} user={user} dbname=mall password='{PASSWORD}'")
}

/// Clients of three kinds, each in a loop, until they are told to stop: what went wrong, and how much went well.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    fn begin(port: u16) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let clients = (0..30).map(|number| {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            tokio::spawn(async move {
                let mut wrong = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let outcome = match number % 3 {
                        0 => comes_anew(port).await,
                        1 => stays(port, &stop, &done).await,
                        _ => stays_and_prepares(port, &stop, &done).await,
                    };
                    match outcome {
                        Ok(()) => drop(done.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => wrong.push(format!("{number}: {error:?}")),
                    }
                }
                wrong
            })
        });
        let clients = clients.collect();
        Load { stop, done, clients }
    }

    /// Until so much more has gone well.
    async fn more(&self, count: u64) {
        let (from, until) = (self.done.load(Ordering::Relaxed), Moment::now() + SOON);
        while self.done.load(Ordering::Relaxed) < from + count {
            assert!(Moment::now() < until, "the load stands still");
            // sleep: between two looks.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut wrong = Vec::new();
        for client in self.clients {
            wrong.extend(client.await.unwrap());
        }
        (self.done.load(Ordering::Relaxed), wrong)
    }
}

async fn comes_anew(port: u16) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(&conninfo(port, "alice"), NoTls).await?;
    let connection = tokio::spawn(connection);
    client.simple_query("SELECT 1").await?;
    drop(client);
    connection.await.unwrap()
}

async fn stays(port: u16, stop: &AtomicBool, done: &AtomicU64) -> Result<(), tokio_postgres::Error> {
    let (mut client, connection) = tokio_postgres::connect(&conninfo(port, "alice"), NoTls).await?;
    let connection = tokio::spawn(connection);
    while !stop.load(Ordering::Relaxed) {
        let transaction = client.transaction().await?;
        transaction.simple_query("INSERT INTO sold VALUES (1)").await?;
        transaction.simple_query("SELECT pg_sleep(0.002)").await?;
        transaction.commit().await?;
        done.fetch_add(1, Ordering::Relaxed);
    }
    drop(client);
    connection.await.unwrap()
}

async fn stays_and_prepares(
    port: u16,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(&conninfo(port, "alice"), NoTls).await?;
    let connection = tokio::spawn(connection);
    client.batch_execute("SET application_name = 'till'").await?;
    let statement = client.prepare("SELECT current_setting('application_name') || $1").await?;
    while !stop.load(Ordering::Relaxed) {
        let row = client.query_one(&statement, &[&"!"]).await?;
        assert_eq!(row.get::<_, &str>(0), "till!");
        done.fetch_add(1, Ordering::Relaxed);
    }
    drop((statement, client));
    connection.await.unwrap()
}

async fn at(port: u16) -> Client {
    connect(&conninfo(port, "alice")).await.unwrap()
}

/// How many processes there are, and how many of them accept.
async fn processes(dir: &Path) -> (usize, usize) {
    let found = Place::look(dir).unwrap().processes().await.unwrap();
    (found.len(), found.iter().filter(|process| process.accepts).count())
}

story! {
    async fn nobody_notices_that_a_proxy_is_replaced_three_times_in_a_row(scene) {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("run");
        let admin = connect(&format!("host=127.0.0.1 port={} user=postgres dbname=mall", scene.server.port)).await.unwrap();
        admin.batch_execute("CREATE TABLE sold (n int); GRANT ALL ON sold TO alice").await.unwrap();
        let (first, port) = Process::accepting(scene, &dir, "alone");
        let load = Load::begin(port);
        load.more(100).await;

        // Somebody with a transaction that is open all the time, and somebody who waits for a very long answer.
        let open = at(port).await;
        open.batch_execute("BEGIN; INSERT INTO sold VALUES (4711)").await.unwrap();
        let waits = at(port).await;
        let cancel = waits.cancel_token();
        let waiting = tokio::spawn(async move { waits.simple_query("SELECT pg_sleep(600)").await.map(drop) });

        let (mut generations, mut held) = (vec![first], Vec::new());
        for number in 0..3 {
            let (next, same) = Process::accepting(scene, &dir, "takes over");
            assert_eq!(same, port, "at the same address");
            generations.push(next);
            load.more(100).await;
            held.push(at(port).await);
            assert_eq!(one(&held[number], "SELECT 1").await, "1");
            assert_eq!(processes(&dir).await, (number + 2, 1), "each has a client that stays");
        }

        // By now its key is that of a process that accepts nobody any more, three generations ago.
        cancel.cancel_query(NoTls).await.unwrap();
        let (sqlstate, _) = told(&tokio::time::timeout(SOON, waiting).await.unwrap().unwrap().unwrap_err());
        assert_eq!(sqlstate, "57014");
        open.batch_execute("COMMIT").await.unwrap();
        assert_eq!(one(&admin, "SELECT count(*) FROM sold WHERE n = 4711").await, "1");
        for client in &held {
            assert_eq!(one(client, "SELECT 1").await, "1");
        }
        drop((open, held));

        let (done, wrong) = load.end().await;
        assert!(wrong.is_empty(), "of {done}: {wrong:?}");
        let last = generations.pop().unwrap();
        for former in generations {
            assert!(former.ends().success(), "whoever has no clients any more ends by itself");
        }
        assert_eq!(processes(&dir).await, (1, 1));
        assert_eq!(one(&at(port).await, "SELECT 1").await, "1");
        drop(last);
    }
}

story! {
    async fn a_successor_that_is_killed_is_as_if_it_had_never_been(scene) {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("run");
        let (first, port) = Process::accepting(scene, &dir, "alone");
        let client = at(port).await;

        // It has the listeners, and does not accept yet.
        let mut next = Process::start(scene, &dir, "takes over");
        assert_eq!(next.prepared(), port);
        assert_eq!(one(&at(port).await, "SELECT 1").await, "1");
        next.kill();
        assert_eq!(one(&at(port).await, "SELECT 1").await, "1");

        // It accepts, and has clients. They are lost, and nobody else.
        let (mut next, _) = Process::accepting(scene, &dir, "takes over");
        let (lost, ending) = connect_and_watch(&conninfo(port, "alice")).await.unwrap();
        assert_eq!(one(&lost, "SELECT 1").await, "1");
        next.kill();
        assert!(tokio::time::timeout(SOON, ending).await.unwrap().unwrap().is_err());
        assert_eq!(one(&at(port).await, "SELECT 1").await, "1", "the first one accepts again");
        assert_eq!(one(&client, "SELECT 1").await, "1");
        assert_eq!(processes(&dir).await, (1, 1));

        // And can be taken over for good.
        let (next, _) = Process::accepting(scene, &dir, "takes over");
        drop(client);
        assert!(first.ends().success());
        assert_eq!(one(&at(port).await, "SELECT 1").await, "1");
        drop(next);
    }
}

story! {
    async fn a_former_process_that_is_killed_leaves_everything_to_its_successor(scene) {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("run");
        let (mut first, port) = Process::accepting(scene, &dir, "alone");
        let mut next = Process::start(scene, &dir, "takes over");
        assert_eq!(next.prepared(), port);
        first.kill();
        // Nobody accepts, and yet nobody is refused.
        let comes = tokio::spawn(async move { one(&at(port).await, "SELECT 1").await });
        // sleep: so that it comes before somebody accepts; if it does not, that is no fault.
        tokio::time::sleep(Duration::from_millis(100)).await;
        next.go_on();
        next.says("accepts");
        assert_eq!(comes.await.unwrap(), "1");

        // While it is on probation.
        let (mut last, _) = Process::accepting(scene, &dir, "takes over");
        next.kill();
        assert_eq!(one(&at(port).await, "SELECT 1").await, "1");
        assert_eq!(processes(&dir).await, (1, 1));
        last.go_on();
        assert!(last.ends().success());
    }
}

story! {
    async fn a_proxy_that_was_killed_begins_anew_and_two_never_do(scene) {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("run");
        let nobody = Process::start(scene, &dir, "takes over");
        let said = nobody.says("error ");
        assert!(said.starts_with("no process of this proxy accepts clients"), "{said}");

        let (mut first, port) = Process::accepting(scene, &dir, "alone");
        let second = Process::start(scene, &dir, "alone");
        assert_eq!(second.says("error "), format!("this proxy runs already, as process {}", first.child.id()));

        let (client, ending) = connect_and_watch(&conninfo(port, "alice")).await.unwrap();
        first.kill();
        assert!(tokio::time::timeout(SOON, ending).await.unwrap().unwrap().is_err(), "that is not hidden");
        drop(client);
        let (mut again, port) = Process::accepting(scene, &dir, "alone");
        let (client, ending) = connect_and_watch(&conninfo(port, "alice")).await.unwrap();
        client.batch_execute("BEGIN").await.unwrap();
        assert_eq!(one(&client, "SELECT 1").await, "1");

        // It is asked to end: who is in the middle of something gets that done.
        again.go_on();
        client.batch_execute("SELECT pg_sleep(0.3)").await.unwrap();
        client.batch_execute("COMMIT").await.unwrap();
        assert_eq!(last_word(ending).await.0, "57P01");
        assert!(again.ends().success());
        let left: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"], "nothing is left of it");
    }
}
