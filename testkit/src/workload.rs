//! Clients that write what can be checked later, and keep book.
//!
//! *Writers* insert unique rows into a table **without a key**: a key would turn a statement that was run
//! twice into an error and hide it. Each writer either looks for the node that accepts writes, as an
//! application with several addresses in its connection string does, or stays with one node and hammers it,
//! so that two nodes that accept writes at the same time are both caught in the act.
//!
//! One more client counts a *register* up, and one reader a node reads it wherever a server says that it is
//! no standby: a value older than an acknowledged one is a stale read.
//!
//! All clients run on one thread on the client's host. Every wait has a deadline.
//!
//! Hazard: what a writer does not record, no checker sees. An insert is recorded when it ends, whatever ends
//! it; `stop` waits for those under way.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::background::Background;
use crate::connection::{Answer, Cause, Connection, Login, Session};
use crate::history::{History, Insert, Outcome, PrimaryRead, Set};
use crate::net::{Host, lock};
use crate::wait::wait_until;

/// SQLSTATE of a write on a standby.
const READ_ONLY: &str = "25006";
/// How long a connection whose last statement has no answer is kept. Without this, each timeout would leave a
/// backend behind that waits for replication, until there are no connections left.
const PATIENCE: Duration = Duration::from_secs(10);

/// A place to write to.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub node: String,
    pub address: SocketAddr,
}

/// Where writers write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// So many, each looking for the node that accepts writes.
    Roaming(u32),
    /// One a node, which never leaves it.
    OnePerNode,
    /// Both.
    Both(u32),
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub endpoints: Vec<Endpoint>,
    pub login: Login,
    pub writers: Writers,
    /// From the start of one statement of a client to the start of its next.
    pub pace: Duration,
    pub connect_deadline: Duration,
    pub statement_deadline: Duration,
    /// Whether the register is written and read as well.
    pub register: bool,
}

impl Plan {
    pub const DEFAULT_WRITERS: u32 = 8;

    pub fn new(endpoints: Vec<Endpoint>, login: Login) -> Plan {
        Plan {
            endpoints,
            login,
            writers: Writers::Both(Plan::DEFAULT_WRITERS),
            pace: Duration::from_millis(20),
            connect_deadline: Duration::from_secs(1),
            statement_deadline: Duration::from_secs(1),
            register: true,
        }
    }
}

/// Makes the tables, empty. Once, on the primary, before the first workload.
#[track_caller]
pub fn create_tables(primary: &mut Session) {
    primary.run("DROP TABLE IF EXISTS writes, register");
    primary.run("CREATE TABLE writes (writer bigint NOT NULL, number bigint NOT NULL)");
    primary.run("CREATE TABLE register (value bigint NOT NULL)");
    primary.run("INSERT INTO register VALUES (0)");
}

/// Clients at work until [`Workload::stop`].
#[derive(Debug)]
pub struct Workload {
    history: Arc<Mutex<History>>,
    work: Background,
}

impl Workload {
    #[track_caller]
    pub fn start(client: &Host, plan: Plan) -> Workload {
        assert!(!plan.endpoints.is_empty(), "a workload needs a node to work on");
        let history = Arc::new(Mutex::new(History::new()));
        let book = Arc::clone(&history);
        let work = Background::start("workload", client, move |stop| {
            Shared { history: book, stop, plan: Arc::new(plan) }.run()
        });
        Workload { history, work }
    }

    /// A copy of what has ended until now.
    pub fn history(&self) -> History {
        lock(&self.history).clone()
    }

    pub fn acknowledged(&self) -> usize {
        lock(&self.history).acknowledged().count()
    }

    /// Waits until an insert is acknowledged that was asked for after this call: writes work now.
    #[track_caller]
    pub fn wait_for_writes(&self, deadline: Duration) {
        let now = Instant::now();
        wait_until("a write to be acknowledged", deadline, || {
            let history = lock(&self.history);
            let recent = history.inserts.iter().rev().take_while(|insert| insert.ended_at >= now);
            let mut last = None;
            for insert in recent {
                if insert.asked_at >= now && insert.outcome == Outcome::Acknowledged {
                    return Ok(());
                }
                last = last.or(Some(format!("{:?} on {}", insert.outcome, insert.node)));
            }
            Err(last.unwrap_or_else(|| "no insert has ended since".to_owned()))
        });
    }

    /// Ends the clients, waits for what they have under way, and hands over the book.
    #[track_caller]
    pub fn stop(self) -> History {
        self.work.stop();
        std::mem::take(&mut *lock(&self.history))
    }
}

#[derive(Clone)]
struct Shared {
    history: Arc<Mutex<History>>,
    stop: Arc<AtomicBool>,
    plan: Arc<Plan>,
}

impl Shared {
    async fn run(self) {
        let everywhere = &self.plan.endpoints;
        let (roaming, pinned) = match self.plan.writers {
            Writers::Roaming(count) => (count, false),
            Writers::OnePerNode => (0, true),
            Writers::Both(count) => (count, true),
        };
        let mut clients = JoinSet::new();
        let mut writer = 0..;
        let mut next = || writer.next().expect("the range has no end");
        for _ in 0..roaming {
            clients.spawn(self.clone().write(next(), Links::new(&self.plan, everywhere)));
        }
        for endpoint in everywhere.iter().filter(|_| pinned) {
            clients.spawn(self.clone().write(next(), Links::new(&self.plan, std::slice::from_ref(endpoint))));
        }
        if self.plan.register {
            clients.spawn(self.clone().count_up(Links::new(&self.plan, everywhere)));
            for endpoint in everywhere {
                clients.spawn(self.clone().read(Links::new(&self.plan, std::slice::from_ref(endpoint))));
            }
        }
        while let Some(ended) = clients.join_next().await {
            if let Err(panic) = ended {
                std::panic::resume_unwind(panic.into_panic());
            }
        }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    async fn pace(&self, asked_at: Instant) {
        // sleep: the pace of a client is part of the plan.
        tokio::time::sleep_until((asked_at + self.plan.pace).into()).await;
    }

    async fn write(self, writer: u32, mut links: Links) {
        for number in 1.. {
            if !self.goes_on() {
                return;
            }
            let asked_at = Instant::now();
            // The first eight digits of a WAL file's name are the timeline of the insert itself.
            let statement = format!(
                "INSERT INTO writes VALUES ({writer}, {number}) \
                 RETURNING left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
            );
            let node = links.node();
            let answer = links.ask(statement).await;
            let ended_at = Instant::now();
            let timeline = match &answer {
                Answer::Done(rows) => Some(timeline(rows)),
                _ => None,
            };
            let insert =
                Insert { writer, number, node, asked_at, ended_at, outcome: outcome(answer), timeline };
            lock(&self.history).inserts.push(insert);
            self.pace(asked_at).await;
        }
    }

    async fn count_up(self, mut links: Links) {
        for value in 1.. {
            if !self.goes_on() {
                return;
            }
            let asked_at = Instant::now();
            // A statement that was delayed on its way must not turn the register back.
            let statement = format!("UPDATE register SET value = {value} WHERE value < {value}");
            let answer = links.ask(statement).await;
            let set = Set { value, asked_at, ended_at: Instant::now(), outcome: outcome(answer) };
            lock(&self.history).sets.push(set);
            self.pace(asked_at).await;
        }
    }

    async fn read(self, mut links: Links) {
        while self.goes_on() {
            let asked_at = Instant::now();
            // Two statements, hence two snapshots: the value is read after the server was a primary.
            let answer = links.ask("SELECT pg_is_in_recovery(); SELECT value FROM register".to_owned()).await;
            if let Answer::Done(rows) = answer {
                let cells: Vec<&str> = rows.iter().filter_map(|row| row.first()?.as_deref()).collect();
                match cells[..] {
                    ["f", value] => {
                        let value = value.parse().expect("the column is a bigint that starts at 0");
                        let read =
                            PrimaryRead { value, node: links.node(), asked_at, ended_at: Instant::now() };
                        lock(&self.history).reads.push(read);
                    }
                    ["t", ..] => {}
                    _ => panic!("the register's reader got {cells:?} from {}", links.node()),
                }
            }
            self.pace(asked_at).await;
        }
    }
}

fn outcome(answer: Answer) -> Outcome {
    match answer {
        Answer::Done(_) => Outcome::Acknowledged,
        Answer::Refused(cause) => Outcome::Failed(cause),
        Answer::Unknown(cause) => Outcome::Unknown(cause),
    }
}

fn timeline(rows: &[Vec<Option<String>>]) -> u32 {
    let text = rows.first().and_then(|row| row.first()?.as_deref());
    text.and_then(|text| u32::from_str_radix(text, 16).ok())
        .unwrap_or_else(|| panic!("an insert returns the timeline in hexadecimal, not {rows:?}"))
}

/// A client's connections, one an endpoint at most, and which of them it uses now.
struct Links {
    plan: Arc<Plan>,
    endpoints: Vec<(Arc<str>, SocketAddr)>,
    current: usize,
    states: Vec<Link>,
}

enum Link {
    Closed,
    Open(Connection),
    /// A statement without an answer, given up by the client and still running.
    Stuck(tokio::task::JoinHandle<(Connection, Answer)>, Instant),
}

impl Links {
    fn new(plan: &Arc<Plan>, endpoints: &[Endpoint]) -> Links {
        Links {
            plan: Arc::clone(plan),
            endpoints: endpoints.iter().map(|end| (end.node.as_str().into(), end.address)).collect(),
            current: 0,
            states: endpoints.iter().map(|_| Link::Closed).collect(),
        }
    }

    /// The node that the next statement goes to.
    fn node(&self) -> Arc<str> {
        Arc::clone(&self.endpoints[self.current].0)
    }

    /// Sends a statement to the current node, and moves on to the next one if this one is of no use.
    async fn ask(&mut self, statement: String) -> Answer {
        let answer = match self.connection().await {
            Ok(connection) => self.ask_on(connection, statement).await,
            // Nothing was sent: certainly nothing happened.
            Err(cause) => Answer::Refused(cause),
        };
        let read_only = Answer::Refused(Cause::Sqlstate(READ_ONLY.to_owned()));
        if matches!(answer, Answer::Unknown(_) | Answer::Refused(Cause::NotConnected)) || answer == read_only
        {
            self.current = (self.current + 1) % self.endpoints.len();
        }
        answer
    }

    async fn connection(&mut self) -> Result<Connection, Cause> {
        let link = &mut self.states[self.current];
        match std::mem::replace(link, Link::Closed) {
            Link::Open(connection) if !connection.is_closed() => return Ok(connection),
            Link::Stuck(task, _) if task.is_finished() => {
                if let Ok((connection, _late)) = task.await
                    && !connection.is_closed()
                {
                    return Ok(connection);
                }
            }
            Link::Stuck(task, since) if since.elapsed() < PATIENCE => {
                *link = Link::Stuck(task, since);
                return Err(Cause::NotConnected);
            }
            Link::Stuck(task, _) => task.abort(),
            Link::Open(_) | Link::Closed => {}
        }
        let (_, address) = self.endpoints[self.current];
        Connection::open(address, &self.plan.login, "testkit workload", self.plan.connect_deadline)
            .await
            .map_err(|_| Cause::NotConnected)
    }

    async fn ask_on(&mut self, connection: Connection, statement: String) -> Answer {
        let mut task = tokio::spawn(async move {
            let answer = connection.ask(&statement).await;
            (connection, answer)
        });
        let link = &mut self.states[self.current];
        match tokio::time::timeout(self.plan.statement_deadline, &mut task).await {
            Ok(Ok((connection, answer))) => {
                if matches!(answer, Answer::Done(_) | Answer::Refused(_)) {
                    *link = Link::Open(connection);
                }
                answer
            }
            Ok(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
            Err(_) => {
                *link = Link::Stuck(task, Instant::now());
                Answer::Unknown(Cause::Timeout)
            }
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for link in &self.states {
            if let Link::Stuck(task, _) = link {
                task.abort();
            }
        }
    }
}
