//! Clients that know one address only, and what they see while the primary behind it changes.
//!
//! Many clients write rows into a table without a key, at a fixed rate: some by single statements, some in transactions
//! of several with a pause in the middle, and some only read. Each row has a name of its own, so that afterwards the table
//! itself says whether anything was lost, done twice, or done though the client was told that it was not.
//!
//! Leaves out: what changes the primary, and when.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_postgres::error::Severity;
use tokio_postgres::{Client, NoTls};

use crate::background::Background;
use crate::connection::{Login, Session};
use crate::net::{Host, lock};
use crate::random::Random;
use crate::wait::wait_until;

pub const TABLE: &str = "handed_over";
/// A statement that is not answered by then has failed; a connection, too.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
/// Within a transaction, at most.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// What a client was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Connecting,
    Reading,
    /// A single statement that writes.
    Writing,
    /// A statement of an open transaction.
    InTransaction,
    Committing,
}

/// How one transaction ended.
#[derive(Clone, Debug)]
pub struct Ended {
    pub client: i32,
    /// Of the row, if one was to be written.
    pub number: Option<i64>,
    pub began_at: Instant,
    pub ended_at: Instant,
    /// In which step it failed, and the SQLSTATE; without one the connection ended without a word.
    pub failed: Option<(Step, Option<String>)>,
}

impl Ended {
    /// May the row be there all the same?
    fn may_be_there(&self) -> bool {
        match &self.failed {
            None => true,
            Some((Step::Writing | Step::Committing, sqlstate)) => {
                sqlstate.as_deref().is_none_or(|of| of == "08007")
            }
            Some(_) => false,
        }
    }
}

/// What the table says against what clients were told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    pub acknowledged: usize,
    /// Acknowledged, and not there.
    pub lost: usize,
    /// There more than once.
    pub doubled: usize,
    /// There, though the client was told that it is not.
    pub denied: usize,
    /// Neither acknowledged nor denied.
    pub unknown: usize,
}

/// Clients at work until they are stopped.
#[derive(Debug)]
pub struct Clients {
    ended: Arc<Mutex<Vec<Ended>>>,
    work: Background,
}

impl Clients {
    /// `rate`: transactions a second, of all clients together; without one as fast as they can. Rows are numbered from `first`.
    pub fn start(
        host: &Host,
        proxy: SocketAddr,
        login: Login,
        count: i32,
        rate: Option<f64>,
        first: i64,
    ) -> Clients {
        Clients::begin(host, proxy, login, count, rate, Work::Mixed { first })
    }

    /// Clients that only read. Every other one of them connects anew for each read.
    pub fn reading(host: &Host, proxy: SocketAddr, login: Login, count: i32, rate: f64) -> Clients {
        Clients::begin(host, proxy, login, count, Some(rate), Work::Reads)
    }

    fn begin(
        host: &Host,
        proxy: SocketAddr,
        login: Login,
        count: i32,
        rate: Option<f64>,
        work: Work,
    ) -> Clients {
        let ended = Arc::new(Mutex::new(Vec::new()));
        let every = rate.map(|rate| Duration::from_secs_f64(f64::from(count) / rate));
        let book = Arc::clone(&ended);
        let work = Background::start("clients", host, move |stop| async move {
            let shared = Shared { ended: book, stop, proxy, login, work };
            let clients = (0..count).map(|client| tokio::spawn(shared.clone().run(client, every)));
            for client in clients.collect::<Vec<_>>() {
                client.await.expect("a client does not panic");
            }
        });
        Clients { ended, work }
    }

    /// What has ended until now.
    pub fn ended(&self) -> Vec<Ended> {
        lock(&self.ended).clone()
    }

    pub fn count(&self) -> usize {
        lock(&self.ended).len()
    }

    /// Waits until a row is acknowledged that was asked for after this call.
    #[track_caller]
    pub fn wait_for_writes(&self, deadline: Duration) {
        let now = Instant::now();
        let written = |one: &Ended| one.number.is_some() && one.failed.is_none() && one.began_at > now;
        wait_until("a row to be acknowledged", deadline, || {
            let ended = lock(&self.ended);
            let mut recent = ended.iter().rev().take_while(|one| one.ended_at > now);
            if recent.any(written) { Ok(()) } else { Err("none was".to_owned()) }
        });
    }

    /// Lets each end what it has under way.
    #[track_caller]
    pub fn stop(self) -> Vec<Ended> {
        self.work.stop();
        std::mem::take(&mut *lock(&self.ended))
    }
}

#[derive(Clone)]
struct Shared {
    ended: Arc<Mutex<Vec<Ended>>>,
    stop: Arc<AtomicBool>,
    proxy: SocketAddr,
    login: Login,
    work: Work,
}

/// What clients do.
#[derive(Clone, Copy)]
enum Work {
    Mixed { first: i64 },
    Reads,
}

type Failed = (Step, Option<String>);

impl Shared {
    async fn run(self, client: i32, every: Option<Duration>) {
        let mut random = Random::new(u64::try_from(client).unwrap_or(0));
        let mut connection = None;
        let (mut number, comes_anew) = match self.work {
            Work::Mixed { first } => (first, false),
            Work::Reads => (0, client % 2 == 1),
        };
        let mut next = tokio::time::Instant::now() + every.unwrap_or_default().mul_f64(random.fraction());
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(every) = every {
                // sleep: a rate is kept.
                tokio::time::sleep_until(next).await;
                next += every;
            }
            let began_at = Instant::now();
            let kind = match self.work {
                Work::Mixed { .. } => random.between(0, 10),
                Work::Reads => 0,
            };
            let writes = kind >= 2;
            let done = self.transaction(&mut connection, client, number, kind, &mut random).await;
            let row = writes.then_some(number);
            number += 1;
            let failed = done.err();
            if comes_anew || failed.is_some() && connection.as_ref().is_none_or(Open::has_ended) {
                connection = None;
            }
            lock(&self.ended).push(Ended { client, number: row, began_at, ended_at: Instant::now(), failed });
        }
    }

    async fn transaction(
        &self,
        connection: &mut Option<Open>,
        client: i32,
        number: i64,
        kind: u64,
        random: &mut Random,
    ) -> Result<(), Failed> {
        if connection.as_ref().is_none_or(Open::is_closed) {
            *connection = Some(self.connect().await?);
        }
        let Some(open) = connection.as_ref() else { return Ok(()) };
        let insert = format!("INSERT INTO {TABLE} VALUES ({client}, {number})");
        match kind {
            0..2 => ask(open, Step::Reading, "SELECT count(*) FROM pg_class").await,
            2..7 => ask(open, Step::Writing, &insert).await,
            _ => {
                let pause = LONGEST_PAUSE.mul_f64(random.fraction());
                ask(open, Step::InTransaction, "BEGIN").await?;
                ask(open, Step::InTransaction, &insert).await?;
                // sleep: transactions last a while.
                tokio::time::sleep(pause).await;
                ask(open, Step::InTransaction, "SELECT 1").await?;
                ask(open, Step::Committing, "COMMIT").await
            }
        }
    }

    async fn connect(&self) -> Result<Open, Failed> {
        let mut config = tokio_postgres::Config::new();
        config.host(self.proxy.ip().to_string()).port(self.proxy.port()).user(&self.login.user);
        config.password(&self.login.password).dbname(&self.login.database);
        let connecting = tokio::time::timeout(ANSWER_WITHIN, config.connect(NoTls)).await;
        let (client, connection) = connecting
            .map_err(|_| (Step::Connecting, Some("no answer".to_owned())))?
            .map_err(|error| (Step::Connecting, sqlstate(&error)))?;
        let said = Arc::new(Mutex::new(None));
        let told = Arc::clone(&said);
        tokio::spawn(async move {
            // What the server says while nothing is asked is heard here alone.
            if let Err(error) = connection.await {
                *lock(&told) = sqlstate(&error);
            }
        });
        Ok(Open { client, said, was_told: AtomicBool::new(false) })
    }
}

struct Open {
    client: Client,
    /// The last word of a connection that has ended, if it came unasked.
    said: Arc<Mutex<Option<String>>>,
    /// The last word was an answer.
    was_told: AtomicBool,
}

impl Open {
    fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Also of one that was told so and has not heard the end yet: whoever asks on hears nothing.
    fn has_ended(&self) -> bool {
        self.is_closed() || self.was_told.load(Ordering::Relaxed)
    }
}

async fn ask(open: &Open, step: Step, statement: &str) -> Result<(), Failed> {
    match tokio::time::timeout(ANSWER_WITHIN, open.client.simple_query(statement)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            let severity = error.as_db_error().and_then(|told| told.parsed_severity());
            open.was_told.fetch_or(severity == Some(Severity::Fatal), Ordering::Relaxed);
            Err((step, sqlstate(&error).or_else(|| lock(&open.said).take())))
        }
        Err(_) => Err((step, Some("no answer".to_owned()))),
    }
}

fn sqlstate(error: &tokio_postgres::Error) -> Option<String> {
    error.code().map(|code| code.code().to_owned())
}

/// Without a key: nothing but the clients' own names tells their rows apart.
#[track_caller]
pub fn create_table(primary: &mut Session) {
    primary.run(&format!("CREATE TABLE {TABLE} (client int, number bigint)"));
}

/// How often each row is there.
#[track_caller]
pub fn rows(primary: &mut Session) -> HashMap<(i32, i64), u64> {
    let answer = primary.run(&format!("SELECT client, number, count(*) FROM {TABLE} GROUP BY 1, 2"));
    let numbers = |row: &Vec<Option<String>>| -> Option<((i32, i64), u64)> {
        let [client, number, count] = row.as_slice() else { return None };
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        Some(((text(client).parse().ok()?, text(number).parse().ok()?), text(count).parse().ok()?))
    };
    answer.iter().map(|row| numbers(row).unwrap_or_else(|| panic!("{row:?} is no row of {TABLE}"))).collect()
}

/// The longest time between two acknowledged writes of whomever, the later one after `since`.
pub fn pause(ended: &[Ended], since: Instant) -> Option<Duration> {
    let mut writes: Vec<Instant> = ended
        .iter()
        .filter(|one| one.number.is_some() && one.failed.is_none())
        .map(|one| one.ended_at)
        .collect();
    writes.sort_unstable();
    writes.windows(2).filter(|pair| pair[1] >= since).map(|pair| pair[1] - pair[0]).max()
}

/// How many failed in which step with which SQLSTATE.
pub fn failures(ended: &[Ended]) -> BTreeMap<(Step, String), usize> {
    let mut failures = BTreeMap::new();
    for (step, sqlstate) in ended.iter().filter_map(|one| one.failed.clone()) {
        *failures.entry((step, sqlstate.unwrap_or_else(|| "no word".to_owned()))).or_default() += 1;
    }
    failures
}

/// `rows`: how often each row of the table is there.
pub fn account(ended: &[Ended], rows: &HashMap<(i32, i64), u64>) -> Account {
    let mut account =
        Account { doubled: rows.values().filter(|times| **times > 1).count(), ..Account::default() };
    for one in ended {
        let Some(number) = one.number else { continue };
        let is_there = rows.contains_key(&(one.client, number));
        match (&one.failed, is_there) {
            (None, true) => account.acknowledged += 1,
            (None, false) => account.lost += 1,
            (Some(_), true) if !one.may_be_there() => account.denied += 1,
            (Some(_), _) if one.may_be_there() => account.unknown += 1,
            (Some(_), _) => {}
        }
    }
    account
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(number: i64, ms: u64, failed: Option<(Step, &str)>, start: Instant) -> Ended {
        let at = start + Duration::from_millis(ms);
        let failed =
            failed.map(|(step, sqlstate)| (step, (!sqlstate.is_empty()).then(|| sqlstate.to_owned())));
        Ended { client: 1, number: Some(number), began_at: at, ended_at: at, failed }
    }

    #[test]
    fn the_table_is_held_against_what_clients_were_told() {
        let start = Instant::now();
        let all = [
            ended(1, 10, None, start),
            ended(2, 20, None, start),
            ended(3, 30, Some((Step::Committing, "08007")), start),
            ended(4, 40, Some((Step::Writing, "")), start),
            ended(5, 50, Some((Step::InTransaction, "40001")), start),
            ended(6, 700, Some((Step::InTransaction, "40001")), start),
            ended(7, 800, None, start),
        ];
        let rows = HashMap::from([((1, 1), 1), ((1, 3), 1), ((1, 6), 1), ((1, 7), 2)]);
        let expected = Account { acknowledged: 2, lost: 1, doubled: 1, denied: 1, unknown: 2 };
        assert_eq!(account(&all, &rows), expected);
        assert_eq!(pause(&all, start + Duration::from_millis(100)), Some(Duration::from_millis(780)));
        assert_eq!(pause(&all, start + Duration::from_millis(900)), None);
        let failures = failures(&all);
        assert_eq!(failures[&(Step::InTransaction, "40001".to_owned())], 2);
        assert_eq!(failures[&(Step::Writing, "no word".to_owned())], 1);
    }
}
