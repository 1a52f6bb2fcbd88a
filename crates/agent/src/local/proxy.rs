//! The proxy of a herd on this machine: its place, its certificate and its ports, and one process that is kept
//! running.
//!
//! Another process may take over from that one, whoever started it; then that is the one that is kept, and the former one is left to
//! end with its last client.
//!
//! It is a client of the herd: nothing waits for it, and the herd is healthy without it. Leaves out: what it
//! does, and the renewal of its certificate, which it asks for itself.
//!
//! Hazard: an address that clients know and that changes. So the ports are kept, and another pair is taken only
//! where somebody else has the first.

use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_api::identity::Identity;
use pgherd_api::join::ProxyRequest;
use pgherd_api::proxy::{ProxyQuery, ProxySettings};
use pgherd_proxy::succession::{Found, Place};
use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::LocalError;
use super::agents::{AgentProcess, Agents, keep};
use super::board::Board;
use super::event::Event;
use super::home::give_to;
use super::ports::{Ports, ProxyPorts};
use super::process::{Running, of_command};
use crate::backoff::Backoff;
use crate::files::proxy::{ProxyFile, agent_url};
use crate::pki::{Credentials, CredentialsError, NewKey, PROXY_VALIDITY, Paths, write_public};

/// The command, and its directory in that of the herd.
pub(super) const COMMAND: &str = "proxy";
/// In its certificate.
const NAME: &str = "up";
/// Everything here is on this host, and so are its clients.
const LISTEN: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// How clients of this host may call it.
const HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// It opens its listeners when it has a routing table.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const LOOK_WHO_ACCEPTS_EVERY: Duration = Duration::from_secs(1);
/// For the sessions that it has.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// Keeps the proxy running, once the herd has been healthy.
pub(super) struct ProxyKeeper {
    pub(super) agents: Agents,
    pub(super) board: Board,
    pub(super) healthy: Arc<Notify>,
}

impl ProxyKeeper {
    pub(super) async fn keep(self) {
        if is_displaced(&self.agents) {
            let text = format!("there is no proxy: its directory is that of the node {COMMAND}");
            return self.board.tell(Event::Trouble { node: None, text });
        }
        let mut running = adopt(&self.agents).await.ok().flatten();
        match running.take() {
            Some(process) => {
                self.board.tell(Event::herd("the proxy runs already, and is taken over"));
                running = Some(self.of_this_version(process).await);
            }
            None => self.healthy.notified().await,
        }
        let mut backoff = Backoff::default();
        loop {
            let begun = Instant::now();
            let how = match running.take() {
                Some(process) => self.follow(process).await,
                None => match self.start().await {
                    Ok(process) => self.follow(process).await,
                    Err(error) => error.to_string(),
                },
            };
            let pause = backoff.after(begun.elapsed());
            let text = format!("proxy: {how}; starting it again in {} s", pause.as_secs());
            tracing::warn!("{text}");
            self.board.tell(Event::Trouble { node: None, text });
            sleep(pause).await;
            // The process before it, whose successor has died young.
            running = accepting(&self.agents, None).await;
        }
    }

    /// Until no process accepts clients any more, and how the last one ended.
    async fn follow(&self, mut process: AgentProcess) -> String {
        loop {
            let pid = process.running.id.pid;
            let how = tokio::select! {
                how = process.end() => Some(how),
                () = is_replaced(&self.agents, pid) => None,
            };
            match (accepting(&self.agents, Some(pid)).await, how) {
                (Some(next), how) => {
                    let number = next.running.id.pid;
                    let mut text = format!("proxy: process {number} has taken over from process {pid}");
                    if how.is_none() {
                        text += ", which ends with its last client";
                        // So that nothing is left of it then.
                        tokio::spawn(process.ended());
                    }
                    self.board.tell(Event::herd(text));
                    process = next;
                }
                (None, Some(how)) => return how,
                (None, None) => {}
            }
        }
    }

    /// One that an earlier version of the supervisor has started is replaced; its clients do not notice.
    async fn of_this_version(&self, process: AgentProcess) -> AgentProcess {
        let agents = &self.agents;
        let running = &process.running;
        if running.runs(&agents.program) || !running.runs_program_in(&agents.home.bin_dir()) {
            return process;
        }
        let pid = running.id.pid;
        self.board.tell(Event::herd("the proxy runs another version, which is replaced"));
        match spawn(agents, &["--take-over"]).await {
            Ok(mut next) => tokio::select! {
                how = next.end() => {
                    let text = format!("proxy: it is not replaced: {how}; its log says more");
                    self.board.tell(Event::Trouble { node: None, text });
                    process
                }
                () = is_replaced(agents, pid) => next,
            },
            Err(error) => {
                self.board
                    .tell(Event::Trouble { node: None, text: format!("proxy: it is not replaced: {error}") });
                process
            }
        }
    }

    async fn start(&self) -> Result<AgentProcess, LocalError> {
        let agents = &self.agents;
        let settings = self.settings().await?;
        agents.home.make_proxy(agents.account.as_ref())?;
        self.certify().await?;
        let ports = self.ports(&settings)?;
        let path = agents.home.proxy_file();
        keep(write_public(&path, &proxy_file(settings, ports)?.write()))?;
        give_to(&path, agents.account.as_ref())?;

        let process = spawn(agents, &[]).await?;
        let ProxyPorts { read_write, read_only } = ports;
        if listens(&process.running, ports).await {
            let text = format!("proxy on {LISTEN}:{read_write} (read-write) and {read_only} (read-only)");
            self.board.tell(Event::herd(text));
        } else {
            let text = format!("the proxy does not listen on {LISTEN}:{read_write} and {read_only} yet");
            self.board.tell(Event::Trouble { node: None, text });
        }
        Ok(process)
    }

    /// What the herd wants of it, as the first agent that answers says.
    async fn settings(&self) -> Result<ProxySettings, LocalError> {
        let mut why = "there is no agent".to_owned();
        for client in self.agents.clients() {
            match client.within(ANSWER_WITHIN).proxy(&ProxyQuery { cluster: None }).await {
                Ok(settings) => return Ok(settings),
                Err(error) => why = error.to_string(),
            }
        }
        Err(LocalError::Step { what: "asking what the proxy is to do".to_owned(), output: why })
    }

    /// A certificate that is there and not over is kept: the proxy renews it itself.
    async fn certify(&self) -> Result<(), LocalError> {
        let pki = self.agents.home.proxy_dir().join("pki");
        let own = Identity::Proxy(NAME.to_owned());
        let present = Credentials::load(&pki);
        if present.is_ok_and(|own_now| *own_now.identity() == own && own_now.expires() > Timestamp::now()) {
            return Ok(());
        }
        let failed = |error: &dyn std::fmt::Display| LocalError::Step {
            what: "making the proxy's certificate".to_owned(),
            output: error.to_string(),
        };
        let key = NewKey::generate().map_err(|error| failed(&error))?;
        let request = ProxyRequest {
            name: NAME.to_owned(),
            csr: key.request().map_err(|error| failed(&error))?,
            hosts: HOSTS.map(str::to_owned).to_vec(),
            valid_for_s: PROXY_VALIDITY.as_secs(),
        };
        let mut why = failed(&"there is no agent");
        for client in self.agents.clients() {
            match client.within(ANSWER_WITHIN).proxy_add(&request).await {
                Ok(answer) => {
                    Credentials::save(&pki, &answer.ca, &answer.certificate, &key)
                        .map_err(|error: CredentialsError| failed(&error))?;
                    let Paths { authority, certificate, key } = Paths::of(&pki);
                    return [authority, certificate, key]
                        .iter()
                        .try_for_each(|file| give_to(file, self.agents.account.as_ref()));
                }
                Err(error) => why = failed(&error),
            }
        }
        Err(why)
    }

    /// Those that it had, or the herd file's, or free ones; kept.
    fn ports(&self, settings: &ProxySettings) -> Result<ProxyPorts, LocalError> {
        let home = &self.agents.home;
        let mut kept = Ports::load(home)?.unwrap_or_else(|| self.agents.ports.clone());
        let asked = ProxyPorts { read_write: settings.port, read_only: settings.read_port };
        let (ports, changed) = kept.choose_for_proxy(asked)?;
        if changed {
            kept.save(home)?;
        }
        Ok(ports)
    }
}

/// What the proxy reads when it starts.
fn proxy_file(settings: ProxySettings, ports: ProxyPorts) -> Result<ProxyFile, LocalError> {
    let name = |text: &str| {
        text.parse().map_err(|_| LocalError::Step {
            what: "writing the proxy's file".to_owned(),
            output: format!("\"{text}\" is no name"),
        })
    };
    Ok(ProxyFile {
        name: name(NAME)?,
        cluster: name(&settings.cluster)?,
        herd: Some(settings.herd),
        listen: LISTEN.into(),
        port: Some(ports.read_write),
        read_port: Some(ports.read_only),
        agents: settings.agents.iter().filter_map(|url| agent_url(url)).collect(),
    })
}

/// In a session of its own: a signal to the supervisor's terminal is none to the clients.
async fn spawn(agents: &Agents, more: &[&str]) -> Result<AgentProcess, LocalError> {
    let dir = agents.home.proxy_dir();
    let log = agents.open_log(&agents.home.proxy_log())?;
    let mut command = agents.command(&dir, COMMAND);
    command.arg("--dir").arg(&dir).args(more).stdin(Stdio::null());
    let failed = LocalError::io("duplicate", agents.home.proxy_log());
    command.stdout(log.try_clone().map_err(failed)?).stderr(log);
    #[allow(unsafe_code, reason = "the safe way to a new session is not stable yet")]
    // SAFETY: what runs between fork and exec is one system call, which allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
    }
    let child = command.spawn().map_err(LocalError::io("run", &agents.program))?;
    agents.watch_child(child, &agents.home.proxy_pid_file(), "the proxy").await
}

/// A node may have the proxy's name, and then its directory too.
fn is_displaced(agents: &Agents) -> bool {
    agents.ports.nodes.keys().any(|node| node.as_str() == COMMAND)
}

/// A process that runs already; not one that only has clients of former times.
async fn adopt(agents: &Agents) -> Result<Option<AgentProcess>, LocalError> {
    if is_displaced(agents) {
        return Ok(None);
    }
    if let Some(process) = accepting(agents, None).await {
        return Ok(Some(process));
    }
    // It has just been started, or is of a version that cannot be asked.
    let found = agents.find(&agents.home.proxy_pid_file(), &agents.home.proxy_dir(), COMMAND)?;
    let answering = processes(agents).await;
    let is_retired = |pid: i32| answering.iter().any(|process| process.pid == pid && !process.accepts);
    Ok(found.filter(|process| !is_retired(process.running.id.pid)))
}

/// Those that can be asked.
async fn processes(agents: &Agents) -> Vec<Found> {
    // Where no proxy has ever run there is no such place.
    let Ok(place) = Place::look(&agents.home.proxy_run_dir()) else { return Vec::new() };
    place.processes().await.unwrap_or_default()
}

/// The process that accepts clients, if it is not this one.
async fn accepting(agents: &Agents, but: Option<i32>) -> Option<AgentProcess> {
    let found = async |wanted: Option<i32>| {
        let fits = |found: &&Found| found.accepts && Some(found.pid) != but;
        let processes = processes(agents).await;
        processes
            .iter()
            .filter(fits)
            .map(|found| found.pid)
            .find(|pid| wanted.is_none_or(|wanted| wanted == *pid))
    };
    let pid = found(None).await?;
    let running = Running::open(pid).ok().flatten()?;
    // It is held now, and is the one that was meant if it still answers.
    found(Some(pid)).await?;
    AgentProcess::noted(running, &agents.home.proxy_pid_file())
        .inspect_err(|error| tracing::warn!(%error, "the process of the proxy cannot be noted"))
        .ok()
}

/// Until another process accepts clients.
async fn is_replaced(agents: &Agents, pid: i32) {
    loop {
        sleep(LOOK_WHO_ACCEPTS_EVERY).await;
        if processes(agents).await.iter().any(|found| found.accepts && found.pid != pid) {
            return;
        }
    }
}

/// Waits until both ports take connections, or the proxy has ended.
async fn listens(process: &Running, ports: ProxyPorts) -> bool {
    let both = async {
        for port in ports.all() {
            while TcpStream::connect((LISTEN, port)).await.is_err() {
                sleep(LOOK_EVERY).await;
            }
        }
    };
    tokio::select! {
        both = timeout(LISTENS_WITHIN, both) => both.is_ok(),
        () = process.ended() => false,
    }
}

/// Ends the proxy, which has some time for its clients: all its processes.
pub(super) async fn stop(agents: &Agents, tell: &impl Fn(Event)) {
    if is_displaced(agents) {
        return;
    }
    let adopted = match adopt(agents).await {
        Ok(adopted) => adopted,
        Err(error) => return tell(Event::Trouble { node: None, text: format!("proxy: {error}") }),
    };
    let mut pids = of_command(&agents.home.bin_dir(), Some(&agents.home.proxy_dir()), COMMAND);
    pids.extend(processes(agents).await.iter().map(|found| found.pid));
    pids.extend(adopted.map(|process| process.running.id.pid));
    pids.sort_unstable();
    pids.dedup();
    let running: Vec<Running> =
        pids.into_iter().filter_map(|pid| Running::open(pid).ok().flatten()).collect();
    if running.is_empty() {
        return;
    }
    tell(Event::herd("stops the proxy"));
    for process in &running {
        process.signal(Signal::TERM);
        // A frozen one gets the signal only once it runs again.
        process.signal(Signal::CONT);
    }
    let deadline = Instant::now() + ENDS_WITHIN;
    for process in &running {
        if !process.ended_within(deadline.saturating_duration_since(Instant::now())).await {
            tell(Event::Trouble { node: None, text: "the proxy does not end, and is killed".to_owned() });
            process.signal(Signal::KILL);
            process.ended_within(ENDS_WITHIN).await;
        }
    }
    super::supervisor::forget(&agents.home.proxy_pid_file());
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::TcpListener;
    use std::os::unix::fs::PermissionsExt;

    use pgherd_api::spec::{ApplyRequest, Impact};
    use pgherd_core::types::NodeName;
    use rustix::process::Pid;

    use super::*;
    use crate::backend::tests::{HERD, Scene};
    use crate::http::{Api, Backend, Stop, bind_socket, serve_socket};
    use crate::local::board::Subscription;
    use crate::local::home::Home;
    use crate::pki::OperatorName;

    /// Stands for the proxy: listens where its file says, until it is asked to end.
    const STAND_IN: &str = r#"
        use IO::Socket::INET;
        $| = 1;
        open(my $file, '<', "$ARGV[1]/proxy.toml") or die "no file";
        my @sockets = map { /^(?:read_)?port = (\d+)/ ? IO::Socket::INET->new(LocalAddr => '127.0.0.1',
            LocalPort => $1, Listen => 5, ReuseAddr => 1) || die "port $1" : () } <$file>;
        print "listening\n";
        $SIG{TERM} = sub { exit 0 };
        sleep 1 while 1;
    "#;

    const SOON: Duration = Duration::from_secs(30);

    async fn told(events: &mut Subscription, what: &str) -> Event {
        let wait = async {
            loop {
                match events.next().await {
                    Some(event @ (Event::Step { .. } | Event::Trouble { .. }))
                        if format!("{event:?}").contains(what) =>
                    {
                        return event;
                    }
                    Some(_) => {}
                    None => panic!("nothing more is told"),
                }
            }
        };
        timeout(SOON, wait).await.unwrap_or_else(|_| panic!("not told: {what}"))
    }

    fn keeper(agents: &Agents) -> (ProxyKeeper, Subscription, Arc<Notify>) {
        let (board, healthy) = (Board::default(), Arc::new(Notify::new()));
        let events = board.watch();
        (ProxyKeeper { agents: agents.clone(), board, healthy: Arc::clone(&healthy) }, events, healthy)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_proxy_is_started_for_a_healthy_herd_kept_running_taken_over_and_stopped() {
        // An agent of a herd whose file asks for two free ports.
        let scene = Scene::new().await;
        let free = || TcpListener::bind((LISTEN, 0)).unwrap();
        let (one, other) = (free(), free());
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let (read_write, read_only) = (port(&one), port(&other));
        let proxy = format!("version = 15\n[proxy]\nport = {read_write}\nread_port = {read_only}");
        let text = HERD.replace("version = 15", &proxy);
        let request = ApplyRequest { text, file: None, generation: 1, accept: Impact::Reload };
        scene.backend.apply(&OperatorName::local(), request).await.unwrap();
        drop((one, other));

        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.make(None).unwrap();
        let a: NodeName = "a".parse().unwrap();
        let (ports, _claim) = Ports::choose(std::slice::from_ref(&a)).unwrap();
        ports.save(&home).unwrap();
        let program = home.bin_dir().join("pgherd-x");
        fs::copy("/usr/bin/perl", &program).expect("Debian's base system has perl");
        let agents = Agents { home: home.clone(), program, account: None, ports };
        agents.make_place(&a).unwrap();
        let socket = agents.socket(&a);
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let (_serving, stop_serving) = Stop::new();
        let api = Api::new(Arc::clone(&scene.backend));
        tokio::spawn(serve_socket(bind_socket(&socket).unwrap(), api, stop_serving));
        home.make_proxy(None).unwrap();
        fs::write(home.proxy_dir().join(COMMAND), STAND_IN).unwrap();

        let (first, mut events, healthy) = keeper(&agents);
        let supervisor = tokio::spawn(first.keep());
        tokio::task::yield_now().await;
        assert!(!home.proxy_file().exists(), "the herd is not healthy yet");
        healthy.notify_one();
        let line = format!("proxy on 127.0.0.1:{read_write} (read-write) and {read_only} (read-only)");
        told(&mut events, &line).await;
        let file = fs::read_to_string(home.proxy_file()).unwrap();
        let read: toml_edit::DocumentMut = file.parse().unwrap();
        assert_eq!((read["name"].as_str(), read["cluster"].as_str()), (Some("up"), Some("main")), "{file}");
        assert_eq!(read["agents"].as_array().unwrap().len(), 3);
        let pki = home.proxy_dir().join("pki");
        let credentials = Credentials::load(&pki).unwrap();
        assert_eq!(credentials.identity(), &Identity::Proxy("up".to_owned()));
        assert_eq!(credentials.hosts(), HOSTS);
        let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&home.proxy_dir()), mode(&pki.join("node.key"))), (0o700, 0o600));
        let pid = async |of: &Agents| adopt(of).await.unwrap().map(|process| process.running.id.pid);
        let began = pid(&agents).await.unwrap();
        let session = rustix::process::getsid(Pid::from_raw(began)).unwrap();
        assert_eq!(session.as_raw_nonzero().get(), began, "its session is its own");

        // It is killed, and comes back with the same certificate at the same ports.
        rustix::process::kill_process(Pid::from_raw(began).unwrap(), Signal::KILL).unwrap();
        told(&mut events, "proxy: it was ended by signal 9; starting it again in 1 s").await;
        told(&mut events, &line).await;
        let again = pid(&agents).await.unwrap();
        assert_ne!(again, began);
        assert_eq!(Credentials::load(&pki).unwrap().certificate_pem(), credentials.certificate_pem());

        // Its supervisor is killed; the next one takes it over, before it has looked at the herd.
        supervisor.abort();
        drop(supervisor.await);
        let (second, mut events, _not_yet) = keeper(&agents);
        let supervisor = tokio::spawn(second.keep());
        told(&mut events, "taken over").await;
        assert_eq!(pid(&agents).await, Some(again));
        supervisor.abort();
        drop(supervisor.await);

        stop(&agents, &|_| {}).await;
        assert_eq!(pid(&agents).await, None);
        assert!(!home.proxy_pid_file().exists());
        let log = fs::read_to_string(home.proxy_log()).unwrap();
        assert_eq!(log, "listening\nlistening\n");
        stop(&agents, &|event| panic!("nothing is left to stop: {event:?}")).await;
    }

    #[tokio::test]
    async fn without_an_agent_it_is_tried_again_and_a_node_of_its_name_keeps_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.make(None).unwrap();
        let agents = |name: &str| {
            let (ports, _claim) = Ports::choose(&[name.parse().unwrap()]).unwrap();
            Agents { home: home.clone(), program: "/bin/false".into(), account: None, ports }
        };
        let (lonely, mut events, healthy) = keeper(&agents("a"));
        let keeping = tokio::spawn(lonely.keep());
        healthy.notify_one();
        let event = told(&mut events, "starting it again").await;
        assert!(matches!(event, Event::Trouble { node: None, .. }), "{event:?}");
        keeping.abort();

        let (displaced, mut events, _) = keeper(&agents(COMMAND));
        timeout(SOON, displaced.keep()).await.unwrap();
        told(&mut events, "its directory is that of the node proxy").await;
        assert!(!home.proxy_dir().exists());
    }

    #[test]
    fn its_file_reads_back_whatever_is_in_it() {
        let settings = ProxySettings {
            herd: "sh\"op".to_owned(),
            cluster: "main".to_owned(),
            generation: 1,
            port: 1,
            read_port: 2,
            pool: pgherd_api::proxy::Pool::Session,
            pool_size: 20,
            databases: [].into(),
            users: [].into(),
            options: [].into(),
            console_admins: [].into(),
            console_readers: [].into(),
            metrics_listen: None,
            tls: Default::default(),
            hba: Vec::new(),
            ident: Vec::new(),
            agents: vec!["https://[::1]:8009".to_owned(), "https://a.example.com:8009".to_owned()],
        };
        let ports = ProxyPorts { read_write: 9999, read_only: 9998 };
        let file = proxy_file(settings, ports).unwrap();
        assert_eq!(ProxyFile::read("proxy.toml", &file.write()).unwrap(), file);
        assert_eq!(
            (file.herd.as_deref(), file.port, file.read_port),
            (Some("sh\"op"), Some(9999), Some(9998))
        );
        assert_eq!(file.agents.len(), 2);
    }
}
