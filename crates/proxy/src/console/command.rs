//! What is said to the console: PgBouncer's commands, Pgpool-II's, and pgherd's own.
//!
//! Words are read as PgBouncer reads them: in any case, and literally in double quotes. Leaves out what comes of them.

use pgherd_pgwire::SqlState;

use crate::proxy::Ending;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Show(Show),
    /// A setting that drivers ask for.
    ShowSetting(&'static str, &'static str),
    /// For whoever wants to know whether somebody is there.
    SelectOne,
    /// Taken, and without effect.
    Set,
    Begin,
    Commit,
    Rollback,
    /// Of one database, or of all.
    Pause(Option<String>),
    Resume(Option<String>),
    Reconnect(Option<String>),
    Kill(Option<String>),
    WaitClose(Option<String>),
    KillClient(u64),
    Disable(String),
    Enable(String),
    Reload,
    /// The proxy ends.
    Shutdown(Ending),
    /// A node, by its name or by its number in `SHOW POOL_NODES`.
    Detach(String),
    Attach(String),
    Promote(String),
}

macro_rules! shows {
    ($($variant:ident = $word:literal),* $(,)?) => {
        /// Tables.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Show { $($variant),* }

        impl Show {
            pub const ALL: &[Show] = &[$(Show::$variant),*];

            pub fn word(self) -> &'static str {
                match self { $(Show::$variant => $word),* }
            }
        }
    };
}

shows! {
    Help = "help",
    Version = "version",
    Databases = "databases",
    Pools = "pools",
    Clients = "clients",
    Servers = "servers",
    Sockets = "sockets",
    ActiveSockets = "active_sockets",
    Stats = "stats",
    StatsTotals = "stats_totals",
    StatsAverages = "stats_averages",
    Totals = "totals",
    Lists = "lists",
    Users = "users",
    Config = "config",
    State = "state",
    PoolNodes = "pool_nodes",
    PoolVersion = "pool_version",
    PoolPools = "pool_pools",
    PoolProcesses = "pool_processes",
    PoolStatus = "pool_status",
    PoolBackendStats = "pool_backend_stats",
    PoolHealthCheckStats = "pool_health_check_stats",
    Pgherd = "pgherd",
    Pins = "pins",
    Events = "events",
}

/// What there is to say, for hints and for `SHOW HELP`.
pub(super) const HELP: &str = "SHOW HELP|VERSION|DATABASES|POOLS|CLIENTS|SERVERS|SOCKETS|ACTIVE_SOCKETS|LISTS|USERS|CONFIG|STATE, \
    SHOW STATS|STATS_TOTALS|STATS_AVERAGES|TOTALS, \
    SHOW POOL_NODES|POOL_VERSION|POOL_POOLS|POOL_PROCESSES|POOL_STATUS|POOL_BACKEND_STATS|POOL_HEALTH_CHECK_STATS, \
    SHOW PGHERD|PINS|EVENTS, PAUSE [db], RESUME [db], RECONNECT [db], KILL [db], KILL_CLIENT id, DISABLE db, ENABLE db, \
    WAIT_CLOSE [db], RELOAD, SHUTDOWN [WAIT_FOR_SERVERS|WAIT_FOR_CLIENTS], DETACH node, ATTACH node, PROMOTE node";

/// What drivers ask for when they begin, with what they are told.
const SETTINGS: [(&str, &str); 12] = [
    ("client_encoding", "UTF8"),
    ("datestyle", "ISO, MDY"),
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("extra_float_digits", "1"),
    ("in_hot_standby", "off"),
    ("integer_datetimes", "on"),
    ("server_version", super::SERVER_VERSION),
    ("standard_conforming_strings", "on"),
    ("timezone", "UTC"),
    ("transaction_isolation", "read committed"),
    ("transaction_read_only", "off"),
];

/// What drivers and psql set, and what has no meaning here.
const SETTABLE: [&str; 9] = [
    "application_name",
    "client_min_messages",
    "idle_in_transaction_session_timeout",
    "intervalstyle",
    "lock_timeout",
    "names",
    "search_path",
    "session",
    "statement_timeout",
];

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub sqlstate: SqlState,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Refused {
    pub(super) fn new(code: &[u8; 5], message: impl Into<String>) -> Refused {
        let sqlstate = SqlState::new(code).unwrap_or(SqlState::FEATURE_NOT_SUPPORTED);
        Refused { sqlstate, message: message.into(), detail: None, hint: None }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Refused {
        Refused { hint: Some(hint.into()), ..self }
    }
}

fn unknown(text: &str) -> Refused {
    let shown: String = text.chars().take(80).collect();
    Refused::new(b"42601", format!("invalid command \"{shown}\"")).hint(HELP)
}

fn not_here(what: &str, hint: &str) -> Refused {
    Refused::new(b"0A000", what).hint(hint)
}

impl Command {
    /// Does it change something, for which one must be an administrator?
    pub(super) fn acts(&self) -> bool {
        use Command::{Begin, Commit, Rollback, SelectOne, Set, Show, ShowSetting};
        !matches!(self, Show(_) | ShowSetting(..) | SelectOne | Set | Begin | Commit | Rollback)
    }

    /// What it is answered with when it is done.
    pub(super) fn tag(&self) -> &'static str {
        match self {
            Command::Show(_) | Command::ShowSetting(..) => "SHOW",
            Command::SelectOne => "SELECT 1",
            Command::Set => "SET",
            Command::Begin => "BEGIN",
            Command::Commit => "COMMIT",
            Command::Rollback => "ROLLBACK",
            Command::Pause(_) => "PAUSE",
            Command::Resume(_) => "RESUME",
            Command::Reconnect(_) => "RECONNECT",
            Command::Kill(_) => "KILL",
            Command::WaitClose(_) => "WAIT_CLOSE",
            Command::KillClient(_) => "KILL_CLIENT",
            Command::Disable(_) => "DISABLE",
            Command::Enable(_) => "ENABLE",
            Command::Reload => "RELOAD",
            Command::Shutdown(_) => "SHUTDOWN",
            Command::Detach(_) => "DETACH",
            Command::Attach(_) => "ATTACH",
            Command::Promote(_) => "PROMOTE",
        }
    }
}

/// The commands of a text, between semicolons.
pub(super) fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut begin, mut quote) = (Vec::new(), 0, None);
    for (at, letter) in text.char_indices() {
        match (letter, quote) {
            ('"' | '\'', None) => quote = Some(letter),
            (letter, Some(open)) if letter == open => quote = None,
            (';', None) => {
                parts.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect()
}

/// One word of a command.
#[derive(Debug)]
struct Word {
    text: String,
    is_quoted: bool,
}

impl Word {
    fn is(&self, word: &str) -> bool {
        !self.is_quoted && self.text.eq_ignore_ascii_case(word)
    }

    /// A name as PostgreSQL reads it.
    fn name(self) -> String {
        if self.is_quoted { self.text } else { self.text.to_lowercase() }
    }
}

/// `None`: a quote that does not end, or what is no word.
fn words(text: &str) -> Option<Vec<Word>> {
    let mut words = Vec::new();
    let mut rest = text.trim();
    while let Some(first) = rest.chars().next() {
        if matches!(first, '"' | '\'') {
            let mut inner = String::new();
            let mut letters = rest.char_indices().skip(1).peekable();
            let end = loop {
                let (at, letter) = letters.next()?;
                if letter != first {
                    inner.push(letter);
                } else if letters.next_if(|(_, next)| *next == first).is_some() {
                    inner.push(first);
                } else {
                    break at + 1;
                }
            };
            words.push(Word { text: inner, is_quoted: true });
            rest = rest[end..].trim_start();
        } else {
            let end = rest.find(|letter: char| letter.is_whitespace() || matches!(letter, '"' | '\'' | '='));
            let end = end.unwrap_or(rest.len()).max(usize::from(first == '='));
            words.push(Word { text: rest[..end].to_owned(), is_quoted: false });
            rest = rest[end..].trim_start();
        }
    }
    Some(words)
}

/// Reads one command, without the semicolon.
pub(super) fn parse(text: &str) -> Result<Command, Refused> {
    let mut words = words(text).ok_or_else(|| unknown(text))?.into_iter();
    let first = words.next().ok_or_else(|| unknown(text))?;
    if first.is_quoted {
        return Err(unknown(text));
    }
    let verb = first.text.to_ascii_lowercase();
    let mut rest: Vec<Word> = words.collect();
    match verb.as_str() {
        "set" => return set(text, &rest),
        "begin" | "start" => return Ok(Command::Begin),
        "commit" | "end" => return Ok(Command::Commit),
        "rollback" | "abort" => return Ok(Command::Rollback),
        "reset" | "discard" | "deallocate" | "unlisten" => return Ok(Command::Set),
        "show" => return show(text, &rest),
        // As in PgBouncer; and for whoever wants to know whether somebody is there.
        "select" if rest.len() == 1 && rest[0].is("1") => return Ok(Command::SelectOne),
        "select" => return show(text, &rest),
        _ => {}
    }
    if rest.len() > 1 {
        return Err(unknown(text));
    }
    let argument = rest.pop();
    let required = |what: &str, argument: Option<Word>| {
        argument
            .map(Word::name)
            .ok_or_else(|| Refused::new(b"42601", format!("{what} is required")).hint(HELP))
    };
    let nothing = |command, argument: &Option<Word>| match argument {
        None => Ok(command),
        Some(_) => Err(unknown(text)),
    };
    Ok(match verb.as_str() {
        "pause" => Command::Pause(argument.map(Word::name)),
        "resume" => Command::Resume(argument.map(Word::name)),
        "reconnect" => Command::Reconnect(argument.map(Word::name)),
        "kill" => Command::Kill(argument.map(Word::name)),
        "wait_close" => Command::WaitClose(argument.map(Word::name)),
        "kill_client" => {
            let id = required("the id of a client", argument)?;
            let id = id.parse().map_err(|_| {
                Refused::new(b"22P02", format!("\"{id}\" is no id of a client"))
                    .hint("SHOW CLIENTS lists them, in the column id.")
            })?;
            Command::KillClient(id)
        }
        "disable" => Command::Disable(required("a database", argument)?),
        "enable" => Command::Enable(required("a database", argument)?),
        "reload" => nothing(Command::Reload, &argument)?,
        "detach" | "pcp_detach_node" => Command::Detach(required("a node", argument)?),
        "attach" | "pcp_attach_node" => Command::Attach(required("a node", argument)?),
        "promote" | "pcp_promote_node" => Command::Promote(required("a node", argument)?),
        "suspend" => {
            return Err(not_here(
                "there is nothing to suspend for: a proxy is replaced without it",
                "PAUSE lets what is under way end and holds what is new; pgherd proxy --take-over replaces the process.",
            ));
        }
        "shutdown" => match &argument {
            None => Command::Shutdown(Ending::Now),
            Some(how) if how.is("wait_for_servers") => {
                Command::Shutdown(Ending::AfterServers { within: None })
            }
            Some(how) if how.is("wait_for_clients") => Command::Shutdown(Ending::AfterClients),
            Some(_) => return Err(unknown(text)),
        },
        _ => return Err(unknown(text)),
    })
}

fn show(text: &str, rest: &[Word]) -> Result<Command, Refused> {
    if let [transaction, isolation, level] = rest
        && transaction.is("transaction")
        && isolation.is("isolation")
        && level.is("level")
    {
        return Ok(Command::ShowSetting("transaction_isolation", "read committed"));
    }
    let [what] = rest else { return Err(unknown(text)) };
    let known = |show: &&Show| what.text.eq_ignore_ascii_case(show.word());
    if let Some(show) = Show::ALL.iter().find(known) {
        return Ok(Command::Show(*show));
    }
    if let Some((name, value)) = SETTINGS.iter().find(|(name, _)| what.text.eq_ignore_ascii_case(name)) {
        return Ok(Command::ShowSetting(name, value));
    }
    match what.text.to_ascii_lowercase().as_str() {
        "fds" | "mem" | "dns_hosts" | "dns_zones" | "peers" | "peer_pools" => Err(not_here(
            &format!("there is nothing to show of {}", what.text.to_uppercase()),
            "A proxy of a herd has no peers and asks no name server; what a client costs is in docs/concepts/console.md.",
        )),
        "pool_cache" => Err(not_here("the proxy caches no results", HELP)),
        _ => Err(unknown(text)),
    }
}

fn set(text: &str, rest: &[Word]) -> Result<Command, Refused> {
    let scopes = |word: &&Word| !(word.is("session") || word.is("local"));
    let Some(name) = rest.iter().find(scopes).or(rest.first()) else { return Err(unknown(text)) };
    let is = |known: &&str| name.text.eq_ignore_ascii_case(known);
    if SETTABLE.iter().any(is) || SETTINGS.iter().any(|(known, _)| is(known)) {
        return Ok(Command::Set);
    }
    Err(not_here(
        &format!("\"{}\" is not set here", name.text),
        "What proxies do stands in [proxy] of the herd file, and is changed by: pgherd apply",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_as_pgbouncer_reads_them() {
        for (text, command) in [
            ("SHOW POOLS", Command::Show(Show::Pools)),
            ("  show\n\"pools\" ", Command::Show(Show::Pools)),
            ("select stats", Command::Show(Show::Stats)),
            ("SELECT 1", Command::SelectOne),
            ("pause", Command::Pause(None)),
            ("PAUSE Shop", Command::Pause(Some("shop".to_owned()))),
            ("PAUSE \"Shop \"\"x\"\"\"", Command::Pause(Some("Shop \"x\"".to_owned()))),
            ("KILL_CLIENT 1234", Command::KillClient(1234)),
            ("RELOAD", Command::Reload),
            ("shutdown", Command::Shutdown(Ending::Now)),
            ("SHUTDOWN WAIT_FOR_SERVERS", Command::Shutdown(Ending::AfterServers { within: None })),
            ("shutdown wait_for_clients", Command::Shutdown(Ending::AfterClients)),
            ("SET extra_float_digits = 3", Command::Set),
            ("SET SESSION application_name TO 'x'", Command::Set),
            ("BEGIN READ ONLY", Command::Begin),
            (
                "show transaction isolation level",
                Command::ShowSetting("transaction_isolation", "read committed"),
            ),
            ("pcp_detach_node 1", Command::Detach("1".to_owned())),
            ("PROMOTE b", Command::Promote("b".to_owned())),
            ("pcp_promote_node 1", Command::Promote("1".to_owned())),
        ] {
            assert_eq!(parse(text), Ok(command), "{text}");
        }
        for (text, code) in [
            ("SHOW", b"42601"),
            ("SHOW POOLS now", b"42601"),
            ("\"show\" pools", b"42601"),
            ("PAUSE a b", b"42601"),
            ("PAUSE \"a", b"42601"),
            ("RELOAD x", b"42601"),
            ("DISABLE", b"42601"),
            ("KILL_CLIENT all", b"22P02"),
            ("KILL_CLIENT", b"42601"),
            ("SHUTDOWN abruptly", b"42601"),
            ("SHUTDOWN \"wait_for_clients\"", b"42601"),
            ("SUSPEND", b"0A000"),
            ("PROMOTE", b"42601"),
            ("SHOW FDS", b"0A000"),
            ("SET default_pool_size = 3", b"0A000"),
            ("\\d", b"42601"),
            ("DROP TABLE x", b"42601"),
        ] {
            let refused = parse(text).unwrap_err();
            assert_eq!(refused.sqlstate.as_bytes(), code, "{text}: {refused:?}");
            assert!(refused.hint.is_some(), "{text}: what else to do");
        }
    }

    #[test]
    fn semicolons_part_commands_but_not_in_quotes() {
        assert_eq!(split(" show pools ;; pause \"a;b\"; "), ["show pools", "pause \"a;b\""]);
        assert_eq!(split(" ; "), Vec::<&str>::new());
    }

    #[test]
    fn the_help_names_every_table() {
        for show in Show::ALL {
            assert!(HELP.contains(&show.word().to_uppercase()), "{show:?}");
            assert_eq!(parse(&format!("SHOW {}", show.word())), Ok(Command::Show(*show)));
        }
    }
}
