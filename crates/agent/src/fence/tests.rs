//! The fence, its agent and a PostgreSQL as real processes. The first two are this test program, started
//! again; PostgreSQL is a shell script of that name with children in sessions of their own.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgherd_core::types::Term;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::handle::Launch;
use super::kill::Server;
use super::wire::Directory;
use super::{Arming, Deadline, Handle, Target};
use crate::clock;
use crate::pki::{Authority, CA_VALIDITY, Credentials, NODE_VALIDITY, NewKey, NodeSubject, ServerTls};
use crate::pki::{sign_fenced, verify_fenced};

/// Short enough to wait for, long enough for an agent on a busy machine.
const GRACE: Duration = Duration::from_secs(3);
const SOON: Duration = Duration::from_secs(20);
const BEAT_EVERY: Duration = Duration::from_millis(100);
const PLAN: &str = "PGHERD_TEST_PLAN";

/// What a test tells its agent; read again at each turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Plan {
    dir: PathBuf,
    postmaster: i32,
    target: String,
    ca: String,
    message: pgherd_api::peer::Fenced,
    wish: Wish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Wish {
    /// Has begun, and not looked at PostgreSQL yet.
    Starting,
    Armed,
    Disarmed,
    /// Ends, and PostgreSQL with it.
    Retired,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Told {
    agent: u32,
    fence: Option<i32>,
    armed: Option<u64>,
}

#[test]
#[ignore = "is the fence's process of the other tests"]
fn as_fence() {
    if std::env::var_os(PLAN).is_some() {
        super::run().unwrap();
    }
}

#[test]
#[ignore = "is the agent's process of the other tests"]
fn as_agent() {
    let Some(plan) = std::env::var_os(PLAN) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(live_as_agent(Path::new(&plan)));
}

async fn live_as_agent(plan_file: &Path) {
    let read = || serde_json::from_slice::<Plan>(&fs::read(plan_file).unwrap()).unwrap();
    let dir = read().dir;
    let launch = Launch {
        program: std::env::current_exe().unwrap(),
        args: arguments("as_fence"),
        socket: dir.join("fence.sock"),
    };
    let handle = Handle::launch(launch).unwrap();
    loop {
        let plan = read();
        match plan.wish {
            Wish::Starting => {}
            Wish::Armed => handle.arm(Arming {
                term: Term(plan.message.term),
                postmaster: plan.postmaster,
                data_dir: plan.dir.join("data"),
                agent_grace: GRACE,
                message: plan.message,
                targets: vec![Target { node: "b".to_owned(), address: plan.target }],
                authorities: plan.ca,
            }),
            Wish::Disarmed => handle.disarm(),
            Wish::Retired => return handle.retire().await,
        }
        if plan.wish != Wish::Starting {
            handle.beat(Deadline { at: clock::now() + GRACE, patient: true });
        }
        let status = handle.status().borrow().clone();
        let armed = status.armed.map(|term| term.0);
        replace(&dir.join("told"), &Told { agent: std::process::id(), fence: status.pid, armed });
        // sleep: an agent's loop turns so often.
        tokio::time::sleep(BEAT_EVERY).await;
    }
}

fn arguments(test: &str) -> Vec<std::ffi::OsString> {
    [&format!("fence::tests::{test}"), "--exact", "--ignored", "--nocapture"].map(Into::into).into()
}

fn replace<T: Serialize>(path: &Path, value: &T) {
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec(value).unwrap()).unwrap();
    fs::rename(temporary, path).unwrap();
}

/// One herd in a temporary directory: a PostgreSQL, perhaps an agent, and node b, who hears of the release.
struct Scene {
    dir: tempfile::TempDir,
    plan: Plan,
    postmaster: Child,
    agent: Option<Child>,
    /// What b heard, and how many processes of PostgreSQL were alive then.
    heard: mpsc::Receiver<(u64, usize)>,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let (authority, _) = Authority::create(&"shop".parse().unwrap(), "4f1c", now, CA_VALIDITY).unwrap();
        let credentials = |name: &str| {
            let key = NewKey::generate().unwrap();
            let subject = NodeSubject { name: &name.parse().unwrap(), hosts: &[], others: &[] };
            let pem = authority.issue_node(&key.request().unwrap(), &subject, now, NODE_VALIDITY).unwrap();
            Credentials::from_pem(authority.certificate_pem(), &pem, &key.expose_pem()).unwrap()
        };
        let member = "a_3".parse().unwrap();
        let message =
            sign_fenced(&credentials("a"), "4f1c", &"main".parse().unwrap(), &member, Term(7)).unwrap();
        let postmaster = start_postgres(dir.path());
        let (target, heard) = listen_as_b(&credentials("b"), &authority, dir.path().join("data"));
        let plan = Plan {
            dir: dir.path().to_owned(),
            postmaster: i32::try_from(postmaster.id()).unwrap(),
            target,
            ca: authority.certificate_pem().to_owned(),
            message,
            wish: Wish::Armed,
        };
        Scene { dir, plan, postmaster, agent: None, heard }
    }

    fn start_agent(&mut self, wish: Wish) {
        let plan = self.dir.path().join("plan");
        replace(&plan, &Plan { wish, ..self.plan.clone() });
        let agent = Command::new(std::env::current_exe().unwrap())
            .args(arguments("as_agent"))
            .env(PLAN, &plan)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.agent = Some(agent);
    }

    fn wish(&self, wish: Wish) {
        replace(&self.dir.path().join("plan"), &Plan { wish, ..self.plan.clone() });
    }

    /// With an agent whose fence is armed.
    fn armed() -> Scene {
        let mut scene = Scene::new();
        scene.start_agent(Wish::Armed);
        scene.until_armed();
        scene
    }

    fn told(&self) -> Told {
        let told = fs::read(self.dir.path().join("told")).unwrap_or_default();
        let told: Told = serde_json::from_slice(&told).unwrap_or_default();
        // Of an agent before this one it is no news.
        if self.agent.as_ref().map(Child::id) == Some(told.agent) { told } else { Told::default() }
    }

    fn until_armed(&self) -> i32 {
        until("the fence is armed", SOON, || self.told().fence.filter(|_| self.told().armed == Some(7)))
    }

    fn agent_pid(&self) -> i32 {
        i32::try_from(self.agent.as_ref().unwrap().id()).unwrap()
    }

    fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// When the agent's loop turned last: on a busy machine that is longer ago than a turn takes.
    fn turned(&self) -> Instant {
        let told = fs::metadata(self.dir.path().join("told")).unwrap().modified().unwrap();
        Instant::now() - told.elapsed().unwrap_or_default()
    }

    fn processes(&self) -> usize {
        postgres_processes(&self.dir.path().join("data"))
    }

    /// The release arrives, after everything is gone, and not before the grace was over.
    fn fires(&mut self, silent_since: Instant) {
        let (term, left) = self.heard.recv_timeout(SOON).expect("b hears of the release");
        assert_eq!((term, left), (7, 0), "term, processes left when the message came");
        assert_eq!(self.processes(), 0);
        // A child of PostgreSQL that stands elsewhere, as an archive command may.
        let helper = fs::read_to_string(self.dir.path().join("helper")).unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", helper.trim())).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
        assert!(self.postmaster.wait().unwrap().code().is_none(), "killed");
        let took = silent_since.elapsed();
        assert!(took > GRACE - 2 * BEAT_EVERY, "fired after {took:?}");
    }

    fn stays_alive(&self, span: Duration) {
        let until = Instant::now() + span;
        while Instant::now() < until {
            assert_eq!(self.processes(), PROCESSES, "PostgreSQL was killed");
            // sleep: between two looks at what must stay.
            std::thread::sleep(BEAT_EVERY);
        }
        assert!(self.heard.try_recv().is_err(), "a release was sent");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let fence = self.told().fence;
        if let Some(agent) = &mut self.agent {
            drop(agent.kill());
            drop(agent.wait());
        }
        for pid in fences(self.dir.path()).into_iter().chain(fence) {
            signal(pid, Signal::KILL);
        }
        if let Ok(None) = self.postmaster.try_wait() {
            let directory = Directory::of(&fs::metadata(self.dir.path().join("data")).unwrap());
            let server = Server::hold(self.plan.postmaster, directory, None).unwrap();
            assert!(!server.is_over());
            server.kill();
        }
        drop(self.postmaster.wait());
    }
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).ok();
}

fn until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        // sleep: between two looks.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The script and two backends, and beside them one of the script's children that is no `postgres`.
const PROCESSES: usize = 3;

/// A postmaster whose children are sessions of their own, as PostgreSQL's are.
fn start_postgres(dir: &Path) -> Child {
    let (data, bin) = (dir.join("data"), dir.join("bin"));
    fs::create_dir(&data).unwrap();
    fs::create_dir_all(bin.join("backend")).unwrap();
    fs::copy("/bin/sleep", bin.join("backend/postgres")).unwrap();
    let backend = bin.join("backend/postgres");
    let script = format!(
        "#!/bin/sh\nsetsid {backend} 1000 &\nsetsid {backend} 1000 &\n(cd / && exec sleep 1000) &\necho $! > {helper}\nwait\n",
        backend = backend.display(),
        helper = dir.join("helper").display(),
    );
    let program = bin.join("postgres");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let child = Command::new(&program).current_dir(&data).stdin(Stdio::null()).spawn().unwrap();
    fs::write(data.join("postmaster.pid"), format!("{}\n{}\n", child.id(), data.display())).unwrap();
    until("PostgreSQL runs", SOON, || (postgres_processes(&data) == PROCESSES).then_some(()));
    child
}

/// Living processes called `postgres` that stand in `data`.
fn postgres_processes(data: &Path) -> usize {
    let data = data.canonicalize().unwrap();
    let alive = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains("(postgres)") && !stat.contains(") Z ")
    };
    let entries = fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.to_owned()))
        .filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data) && alive(pid))
        .count()
}

/// Every fence that an agent of this scene ever started and that is alive.
fn fences(dir: &Path) -> Vec<i32> {
    let plan = format!("{PLAN}={}", dir.join("plan").display());
    let entries = fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let has =
                |text: Vec<u8>, what: &str| text.split(|byte| *byte == 0).any(|part| part == what.as_bytes());
            has(read("environ"), &plan) && has(read("cmdline"), "fence::tests::as_fence")
        })
        .collect()
}

fn listen_as_b(
    credentials: &Credentials,
    authority: &Authority,
    data: PathBuf,
) -> (String, mpsc::Receiver<(u64, usize)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let config = ServerTls::new(credentials).unwrap().config();
    let authority = authority.certificate().clone();
    let (tell, heard) = mpsc::channel();
    std::thread::spawn(move || {
        for tcp in listener.incoming().map_while(Result::ok) {
            let connection = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, tcp);
            let (mut request, mut piece) = (Vec::new(), [0; 4096]);
            let message = loop {
                let read = stream.read(&mut piece).unwrap();
                request.extend_from_slice(&piece[..read]);
                let text = String::from_utf8_lossy(&request);
                assert!(read > 0, "the request ends early: {text}");
                assert!("POST /v1/fenced HTTP/1.1\r\n".starts_with(&text[..text.len().min(26)]));
                let Some((_, body)) = text.split_once("\r\n\r\n") else { continue };
                if let Ok(message) = serde_json::from_str(body) {
                    break message;
                }
            };
            let (_, term) =
                verify_fenced(&message, "4f1c", std::slice::from_ref(&authority), Timestamp::now()).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
            stream.flush().unwrap();
            if tell.send((term.0, postgres_processes(&data))).is_err() {
                return;
            }
        }
    });
    (address, heard)
}

#[test]
fn a_frozen_agent_is_fenced() {
    let mut scene = Scene::armed();
    signal(scene.agent_pid(), Signal::STOP);
    let turned = scene.turned();
    scene.fires(turned);
}

#[test]
fn an_agent_killed_for_good_is_fenced() {
    let mut scene = Scene::armed();
    scene.kill_agent();
    let turned = scene.turned();
    scene.fires(turned);
    // It has done what it was for, and leaves nothing behind.
    until("the fence ends", SOON, || fences(scene.dir.path()).is_empty().then_some(()));
}

#[test]
fn an_agent_back_within_the_grace_adopts_the_fence_and_nothing_happens() {
    let mut scene = Scene::armed();
    let before = scene.until_armed();
    scene.kill_agent();
    scene.start_agent(Wish::Starting);
    // The fence stays armed while the new agent has not looked at PostgreSQL yet.
    assert_eq!(scene.until_armed(), before, "the same fence");
    scene.wish(Wish::Armed);
    scene.stays_alive(GRACE * 2);
    assert_eq!(scene.until_armed(), before);
    // It is not only there: the new agent's silence counts as the old one's did.
    scene.kill_agent();
    let turned = scene.turned();
    scene.fires(turned);
}

#[test]
fn an_agent_that_comes_back_but_whose_loop_does_not_turn_is_fenced() {
    let mut scene = Scene::armed();
    scene.kill_agent();
    let turned = scene.turned();
    scene.start_agent(Wish::Starting);
    scene.fires(turned);
}

#[test]
fn a_killed_fence_is_replaced_and_armed_again() {
    let mut scene = Scene::armed();
    let first = scene.until_armed();
    signal(first, Signal::KILL);
    let second = until("another fence", SOON, || Some(scene.until_armed()).filter(|pid| *pid != first));
    assert_ne!(first, second);
    scene.stays_alive(GRACE);
    scene.kill_agent();
    let turned = scene.turned();
    scene.fires(turned);
}

#[test]
fn a_fence_that_hangs_is_replaced_and_never_wakes_up_to_fire() {
    let scene = Scene::armed();
    let first = scene.until_armed();
    signal(first, Signal::STOP);
    let second = until("another fence", SOON, || Some(scene.until_armed()).filter(|pid| *pid != first));
    assert_eq!(fences(scene.dir.path()), [second]);
    signal(first, Signal::CONT);
    scene.stays_alive(GRACE + Duration::from_secs(1));
}

#[test]
fn a_disarmed_fence_never_fires() {
    let mut scene = Scene::armed();
    scene.wish(Wish::Disarmed);
    until("it is disarmed", SOON, || {
        (scene.told().armed.is_none() && scene.told().fence.is_some()).then_some(())
    });
    scene.kill_agent();
    scene.stays_alive(GRACE * 2);
    assert_eq!(fences(scene.dir.path()), [0; 0], "one without a purpose ends with its agent");
}

#[test]
fn a_fence_that_is_no_longer_needed_ends_with_its_agent() {
    let mut scene = Scene::armed();
    scene.wish(Wish::Retired);
    until("the agent ends", SOON, || scene.agent.as_mut().unwrap().try_wait().unwrap());
    assert_eq!(fences(scene.dir.path()), [0; 0]);
    scene.stays_alive(GRACE + Duration::from_secs(1));
}

#[test]
fn agent_and_fence_that_resume_together_go_on() {
    let scene = Scene::armed();
    let fence = scene.until_armed();
    signal(scene.agent_pid(), Signal::STOP);
    signal(fence, Signal::STOP);
    // sleep: the silence that is tested.
    std::thread::sleep(GRACE + Duration::from_secs(1));
    // The fence first, which is the harder case.
    signal(fence, Signal::CONT);
    // sleep: the head start that is tested.
    std::thread::sleep(Duration::from_millis(300));
    signal(scene.agent_pid(), Signal::CONT);
    scene.stays_alive(GRACE);
    assert_eq!(scene.until_armed(), fence);
}

#[test]
fn an_agent_killed_at_any_point_of_its_start_leaves_one_fence_that_counts() {
    let mut scene = Scene::new();
    for ms in [0, 3, 8, 15, 25, 40, 60, 90, 130, 200] {
        scene.start_agent(Wish::Armed);
        // sleep: the moment of the kill is what varies.
        std::thread::sleep(Duration::from_millis(ms));
        scene.kill_agent();
    }
    scene.start_agent(Wish::Armed);
    let counts = scene.until_armed();
    scene.stays_alive(GRACE + Duration::from_secs(1));
    assert_eq!(scene.until_armed(), counts, "no other fence was needed");
    scene.kill_agent();
    let turned = scene.turned();
    scene.fires(turned);
}
