//! The health paths, with the names and codes of Patroni's, so that load balancers' recipes work unchanged.
//!
//! What a path answers is a pure function of a [`HealthView`]. Where Patroni's answer is built on not
//! knowing, ours differs: a lag that is asked for and not known is not a pass.
//!
//! Hazard: `/primary` that passes on a node whose gate is closed sends clients to a primary that may be on
//! its way out, or not yet proved.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{ALLOW, HeaderValue};
use axum::http::{Method, Response, StatusCode};
use axum::response::IntoResponse;
use axum::routing::any;
use pgherd_api::status::Role;
use serde::Serialize;

use super::answer::{json, respond};
use super::backend::Backend;
use crate::metrics::Metrics;

/// Patroni's `maximum_lag_on_failover`, which `/readiness` uses where no lag is asked for.
const READINESS_LAG_BYTES: u64 = 1 << 20;

/// What the agent knows of its own node, all of it at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthView {
    pub cluster: String,
    pub node: String,
    pub role: Role,
    /// This node holds the term and clients may use it.
    pub gate_open: bool,
    pub postgres: Postgres,
    /// Replication state as the standby sees it: `streaming`, `in archive recovery`.
    pub replication_state: Option<String>,
    /// Its flush counts for commits.
    pub is_voter: bool,
    /// Every commit waits for all voters, and not just for some.
    pub every_voter_needed: bool,
    /// Whether reads may be sent here; a delayed standby's never are.
    pub in_read_pool: bool,
    /// The primary's flush position, as last heard.
    pub primary_lsn: Option<u64>,
    pub received_lsn: Option<u64>,
    pub replayed_lsn: Option<u64>,
    /// The agent's own loop is running as it should.
    pub agent_is_alive: bool,
    pub is_paused: bool,
    pub timeline: Option<u32>,
    pub system_identifier: Option<String>,
    /// PostgreSQL's `server_version_num`.
    pub server_version: Option<u32>,
    pub pending_restart: bool,
    /// RFC 3339.
    pub postmaster_start_time: Option<String>,
    /// When the store was last heard, in seconds since 1970.
    pub store_last_seen_s: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Postgres {
    Running,
    Starting,
    Stopped,
}

/// The parameters that health paths take. Others are ignored, as Patroni does, except tags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthQuery {
    /// Bytes.
    pub lag: Option<u64>,
    pub replication_state: Option<String>,
    /// `/readiness` by what is received instead of what is replayed.
    pub by_received: bool,
    /// pgherd has no tags, so a path that asks for one is not satisfied.
    pub wants_tag: bool,
}

/// Patroni takes a lag that it cannot read for no limit at all, which lets every standby pass.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a number of bytes such as 1048576, 1024kB or 16MB")]
pub struct NotALag(String);

impl HealthQuery {
    pub fn parse(query: &str) -> Result<HealthQuery, NotALag> {
        let mut parsed = HealthQuery::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "lag" => parsed.lag = Some(parse_bytes(value).ok_or_else(|| NotALag(value.to_owned()))?),
                "replication_state" => parsed.replication_state = Some(unescape(value)),
                "mode" => parsed.by_received = value == "write",
                _ => parsed.wants_tag |= name.starts_with("tag_"),
            }
        }
        Ok(parsed)
    }
}

/// PostgreSQL's memory units, in its spelling: B, kB, MB, GB, TB; a fraction is allowed.
fn parse_bytes(text: &str) -> Option<u64> {
    let text = unescape(text);
    let text = text.trim();
    let digits = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim() {
        "" | "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale);
    }
    let fraction: f64 = number.parse().ok()?;
    let bytes = fraction * scale as f64;
    (bytes < u64::MAX as f64).then_some(bytes as u64)
}

/// `%20` and `+`; what is not an escape stays as it is.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).and_then(|two| std::str::from_utf8(two).ok());
        let escaped = digits.filter(|two| two.bytes().all(|byte| byte.is_ascii_hexdigit()));
        match (byte, escaped.and_then(|two| u8::from_str_radix(two, 16).ok())) {
            (b'%', Some(escaped)) => {
                plain.push(escaped);
                at += 2;
            }
            (b'+', _) => plain.push(b' '),
            (other, _) => plain.push(*other),
        }
        at += 1;
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// Whether the node passes the check of this path; None for a path that is none.
pub fn passes(path: &str, query: &HealthQuery, view: &HealthView) -> Option<bool> {
    let primary = view.gate_open && view.role == Role::Primary && view.postgres == Postgres::Running;
    let replica = is_replica(query, view);
    let synchronous = view.is_voter && view.every_voter_needed;
    let tagged = !query.wants_tag;
    Some(match path {
        "/" | "/primary" | "/read-write" | "/leader" | "/master" => primary,
        // A herd has no standby clusters.
        "/standby-leader" | "/standby_leader" => false,
        "/replica" => replica && tagged,
        "/read-only" => (primary || replica) && tagged,
        "/sync" | "/synchronous" => replica && synchronous && tagged,
        "/read-only-sync" | "/read-only-synchronous" => (primary || replica && synchronous) && tagged,
        "/quorum" => replica && view.is_voter && tagged,
        "/read-only-quorum" => (primary || replica && view.is_voter) && tagged,
        "/async" | "/asynchronous" => replica && !view.is_voter && tagged,
        "/health" => view.postgres == Postgres::Running,
        "/liveness" => view.agent_is_alive || view.is_paused,
        "/readiness" => primary || is_ready_standby(query, view),
        "/patroni" => true,
        _ => return None,
    })
}

fn is_replica(query: &HealthQuery, view: &HealthView) -> bool {
    let keeps_up = match query.lag {
        None => true,
        Some(limit) => lag(view.primary_lsn, view.replayed_lsn).is_some_and(|lag| lag <= limit),
    };
    let wanted_state = match &query.replication_state {
        None => true,
        wanted => *wanted == view.replication_state,
    };
    view.role == Role::Standby
        && view.postgres == Postgres::Running
        && view.in_read_pool
        && keeps_up
        && wanted_state
}

fn is_ready_standby(query: &HealthQuery, view: &HealthView) -> bool {
    let position = if query.by_received { view.received_lsn } else { view.replayed_lsn };
    let limit = query.lag.unwrap_or(READINESS_LAG_BYTES);
    matches!(view.role, Role::Standby | Role::Delayed)
        && view.postgres == Postgres::Running
        && view.replication_state.as_deref() == Some("streaming")
        && lag(view.primary_lsn, position).is_some_and(|lag| lag <= limit)
}

/// Unknown is unknown, not 0.
fn lag(primary: Option<u64>, standby: Option<u64>) -> Option<u64> {
    Some(primary?.saturating_sub(standby?))
}

/// The body of every health path, in Patroni's words, for the scripts that read it.
#[derive(Serialize)]
struct Report<'a> {
    state: &'static str,
    role: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    postmaster_start_time: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeline: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replication_state: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    xlog: Option<Xlog>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    sync_standby: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    quorum_standby: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pause: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pending_restart: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    dcs_last_seen: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    database_system_identifier: Option<&'a str>,
    patroni: About<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Xlog {
    Primary {
        location: u64,
    },
    Standby {
        #[serde(skip_serializing_if = "Option::is_none")]
        received_location: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        replayed_location: Option<u64>,
    },
}

#[derive(Serialize)]
struct About<'a> {
    version: &'static str,
    scope: &'a str,
    name: &'a str,
}

impl HealthView {
    fn report(&self) -> Report<'_> {
        let is_primary = self.role == Role::Primary;
        let standby_of_note = !is_primary && self.is_voter;
        Report {
            state: match self.postgres {
                Postgres::Running => "running",
                Postgres::Starting => "starting",
                Postgres::Stopped => "stopped",
            },
            role: match self.role {
                Role::Primary => "primary",
                Role::Standby | Role::Delayed => "replica",
                Role::Witness | Role::Keeper => "uninitialized",
            },
            postmaster_start_time: self.postmaster_start_time.as_deref(),
            server_version: self.server_version,
            timeline: self.timeline,
            replication_state: self.replication_state.as_deref(),
            xlog: match is_primary {
                true => self.primary_lsn.map(|location| Xlog::Primary { location }),
                false if self.received_lsn.or(self.replayed_lsn).is_none() => None,
                false => Some(Xlog::Standby {
                    received_location: self.received_lsn,
                    replayed_location: self.replayed_lsn,
                }),
            },
            sync_standby: standby_of_note && self.every_voter_needed,
            quorum_standby: standby_of_note && !self.every_voter_needed,
            pause: self.is_paused,
            pending_restart: self.pending_restart,
            dcs_last_seen: self.store_last_seen_s,
            database_system_identifier: self.system_identifier.as_deref(),
            patroni: About { version: env!("CARGO_PKG_VERSION"), scope: &self.cluster, name: &self.node },
        }
    }
}

struct Shared<B> {
    backend: Arc<B>,
    metrics: Arc<Metrics>,
}

impl<B> Clone for Shared<B> {
    fn clone(&self) -> Shared<B> {
        Shared { backend: Arc::clone(&self.backend), metrics: Arc::clone(&self.metrics) }
    }
}

pub(super) fn router<B: Backend>(backend: Arc<B>, metrics: Arc<Metrics>) -> Router {
    Router::new().fallback(any(answer::<B>)).with_state(Shared { backend, metrics })
}

/// `/metrics` alone.
pub(super) fn metrics_router(text: impl Fn() -> String + Clone + Send + Sync + 'static) -> Router {
    let answer = async move || respond(StatusCode::OK, openmetrics(), Body::from(text()));
    Router::new().route("/metrics", axum::routing::get(answer))
}

fn openmetrics() -> HeaderValue {
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8")
}

async fn answer<B: Backend>(State(shared): State<Shared<B>>, request: Request) -> Response<Body> {
    let status_only = match *request.method() {
        Method::GET => false,
        // HAProxy's checks read nothing but the status.
        Method::HEAD | Method::OPTIONS => true,
        _ => {
            let mut refused = StatusCode::METHOD_NOT_ALLOWED.into_response();
            refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, OPTIONS"));
            return refused;
        }
    };
    let path = match request.uri().path() {
        "/" => "/",
        path => path.trim_end_matches('/'),
    };
    if path == "/metrics" {
        return respond(StatusCode::OK, openmetrics(), Body::from(shared.metrics.encode()));
    }
    let query = match HealthQuery::parse(request.uri().query().unwrap_or_default()) {
        Ok(query) => query,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    let view = shared.backend.health();
    let status = match passes(path, &query, &view) {
        Some(true) => StatusCode::OK,
        Some(false) => StatusCode::SERVICE_UNAVAILABLE,
        None => return StatusCode::NOT_FOUND.into_response(),
    };
    match status_only {
        true => status.into_response(),
        false => json(status, &view.report()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standby() -> HealthView {
        HealthView {
            cluster: "main".to_owned(),
            node: "b".to_owned(),
            role: Role::Standby,
            gate_open: false,
            postgres: Postgres::Running,
            replication_state: Some("streaming".to_owned()),
            is_voter: true,
            every_voter_needed: true,
            in_read_pool: true,
            primary_lsn: Some(0x500_0000),
            received_lsn: Some(0x500_0000),
            replayed_lsn: Some(0x4ff_0000),
            agent_is_alive: true,
            is_paused: false,
            timeline: Some(4),
            system_identifier: Some("7710".to_owned()),
            server_version: Some(150014),
            pending_restart: false,
            postmaster_start_time: None,
            store_last_seen_s: None,
        }
    }

    fn primary() -> HealthView {
        HealthView {
            role: Role::Primary,
            gate_open: true,
            replication_state: None,
            is_voter: false,
            ..standby()
        }
    }

    const PATHS: [&str; 19] = [
        "/",
        "/primary",
        "/read-write",
        "/leader",
        "/master",
        "/standby-leader",
        "/replica",
        "/read-only",
        "/sync",
        "/synchronous",
        "/read-only-sync",
        "/quorum",
        "/read-only-quorum",
        "/async",
        "/asynchronous",
        "/health",
        "/liveness",
        "/readiness",
        "/patroni",
    ];

    /// One row a node: the paths that pass, and all others do not.
    #[test]
    fn each_kind_of_node_passes_exactly_its_own_checks() {
        let writes = ["/", "/primary", "/read-write", "/leader", "/master"];
        let up = ["/health", "/liveness", "/readiness", "/patroni"];
        let quorum = HealthView { every_voter_needed: false, ..standby() };
        let asynchronous = HealthView { is_voter: false, ..standby() };
        let rows: Vec<(&str, HealthView, Vec<&str>)> = vec![
            (
                "primary with an open gate",
                primary(),
                [&writes[..], &up, &["/read-only", "/read-only-sync", "/read-only-quorum"]].concat(),
            ),
            (
                "primary with a closed gate",
                HealthView { gate_open: false, ..primary() },
                vec!["/health", "/liveness", "/patroni"],
            ),
            (
                "gate said open while PostgreSQL is gone",
                HealthView { postgres: Postgres::Stopped, ..primary() },
                vec!["/liveness", "/patroni"],
            ),
            (
                "standby that every commit waits for",
                standby(),
                [
                    &up[..],
                    &[
                        "/replica",
                        "/read-only",
                        "/sync",
                        "/synchronous",
                        "/read-only-sync",
                        "/quorum",
                        "/read-only-quorum",
                    ],
                ]
                .concat(),
            ),
            (
                "one voter of several",
                quorum,
                [&up[..], &["/replica", "/read-only", "/quorum", "/read-only-quorum"]].concat(),
            ),
            (
                "standby without a vote",
                asynchronous,
                [&up[..], &["/replica", "/read-only", "/async", "/asynchronous"]].concat(),
            ),
            ("standby outside the read pool", HealthView { in_read_pool: false, ..standby() }, up.to_vec()),
            (
                "delayed standby, whatever its pool flag says",
                HealthView { role: Role::Delayed, is_voter: false, ..standby() },
                up.to_vec(),
            ),
            (
                "standby that starts",
                HealthView { postgres: Postgres::Starting, replication_state: None, ..standby() },
                vec!["/liveness", "/patroni"],
            ),
            (
                "witness",
                HealthView { role: Role::Witness, postgres: Postgres::Stopped, is_voter: false, ..standby() },
                vec!["/liveness", "/patroni"],
            ),
            (
                "agent that hangs",
                HealthView { agent_is_alive: false, ..primary() },
                [
                    &writes[..],
                    &[
                        "/read-only",
                        "/read-only-sync",
                        "/read-only-quorum",
                        "/health",
                        "/readiness",
                        "/patroni",
                    ],
                ]
                .concat(),
            ),
        ];
        for (what, view, passing) in rows {
            for path in PATHS {
                let expected = passing.contains(&path);
                let found = passes(path, &HealthQuery::default(), &view);
                assert_eq!(found, Some(expected), "{path} on a {what}");
            }
        }
        assert_eq!(passes("/nothing", &HealthQuery::default(), &primary()), None);
    }

    fn check(path: &str, query: &str, view: &HealthView) -> bool {
        passes(path, &HealthQuery::parse(query).unwrap(), view).unwrap()
    }

    #[test]
    fn lag_is_a_limit_on_what_is_known() {
        let lags_64k = standby();
        assert!(check("/replica", "lag=65536", &lags_64k));
        assert!(!check("/replica", "lag=65535", &lags_64k));
        assert!(check("/replica", "lag=64kB", &lags_64k));
        assert!(check("/read-only", "lag=16MB", &lags_64k));
        assert!(!check("/async", "lag=1", &HealthView { is_voter: false, ..standby() }));
        let unknown = HealthView { primary_lsn: None, ..standby() };
        assert!(check("/replica", "", &unknown), "no lag was asked for");
        assert!(!check("/replica", "lag=16MB", &unknown), "unknown is not small");
        assert!(check("/primary", "lag=0", &primary()), "a primary has none");
    }

    #[test]
    fn readiness_has_a_limit_of_its_own_and_two_ways_to_measure() {
        let lag = |bytes: u64| HealthView { replayed_lsn: Some(0x500_0000 - bytes), ..standby() };
        assert!(check("/readiness", "", &lag(1 << 20)));
        assert!(!check("/readiness", "", &lag((1 << 20) + 1)));
        assert!(check("/readiness", "mode=write", &lag(1 << 24)));
        assert!(!check("/readiness", "mode=apply", &lag(1 << 24)));
        assert!(check("/readiness", "lag=16MB&mode=apply", &lag(1 << 24)));
        let archive = HealthView { replication_state: Some("in archive recovery".to_owned()), ..standby() };
        assert!(!check("/readiness", "", &archive));
    }

    #[test]
    fn replication_state_and_tags_are_asked_for() {
        assert!(check("/replica", "replication_state=streaming", &standby()));
        assert!(!check("/replica", "replication_state=in%20archive+recovery", &standby()));
        let archive = HealthView { replication_state: Some("in archive recovery".to_owned()), ..standby() };
        assert!(check("/replica", "replication_state=in%20archive+recovery", &archive));
        assert!(!check("/replica", "tag_zone=a", &standby()), "there are no tags");
        assert!(check("/primary", "tag_zone=a", &primary()), "Patroni ignores tags here");
    }

    #[test]
    fn bytes_are_read_as_postgresql_writes_them() {
        for (text, bytes) in
            [("0", 0), ("10", 10), ("10B", 10), ("16MB", 16 << 20), ("1.5kB", 1536), ("16%20MB", 16 << 20)]
        {
            assert_eq!(parse_bytes(text), Some(bytes), "{text}");
        }
        for wrong in ["", "MB", "-1", "16mb", "16 furlongs", "1e3", "99999999999TB", "1.2.3", "NaN"] {
            assert_eq!(parse_bytes(wrong), None, "{wrong}");
        }
    }
}
