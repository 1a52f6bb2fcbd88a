//! A backend that answers at once, counts what it is asked, and can be told to be slow.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use pgherd_agent::http::backend::{Answer, Backend};
use pgherd_agent::http::health::{HealthView, Postgres};
use pgherd_agent::pki::OperatorName;
use pgherd_api::change::{
    BackupAsked, BackupRequest, Change, ChangeKind, ChangeState, FailoverRequest, PromoteRequest,
    RestoreAnswer, RestoreRequest, SwitchoverCancelRequest, SwitchoverRequest,
};
use pgherd_api::join::{
    JoinAnswer, JoinRequest, OperatorAnswer, OperatorRequest, ProxyAnswer, ProxyRenewRequest, ProxyRequest,
    RenewAnswer, RenewRequest, Token, TokenRequest,
};
use pgherd_api::logs::{LogLine, LogSource, LogsQuery};
use pgherd_api::peer::Fenced;
use pgherd_api::proxy::{Pool, ProxyQuery, ProxySettings};
use pgherd_api::report::{CheckReport, Explain, History, HistoryQuery};
use pgherd_api::routing::{Drained, Proof, RoutingQuery, RoutingTable};
use pgherd_api::spec::{Applied, ApplyRequest, Plan, PlanRequest, Spec};
use pgherd_api::status::{Gate, Role, Store, StoreKind};
use pgherd_api::wal::{WalAsk, WalTold};
use pgherd_api::{Code, Error, Status, objects};
use pgherd_core::types::NodeName;

pub(crate) type Join = Box<dyn Fn(JoinRequest) -> Answer<JoinAnswer> + Send>;

#[derive(Default)]
pub(crate) struct Fake {
    /// Every request that got past the listeners, as `name of the caller: what`.
    pub(crate) calls: Mutex<Vec<String>>,
    /// How long `peer_report` takes.
    pub(crate) slow_ms: AtomicU64,
    /// How `join` is answered; without one, every token is invalid.
    pub(crate) join: Mutex<Option<Join>>,
    /// Every stream of routing tables holds one.
    pub(crate) stream: Arc<()>,
}

impl Fake {
    fn note(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }

    pub(crate) fn last_call(&self) -> Option<String> {
        self.calls.lock().unwrap().last().cloned()
    }

    fn change(&self, request_id: String, kind: ChangeKind) -> Change {
        Change {
            request_id,
            cluster: "main".to_owned(),
            kind,
            state: ChangeState::Running,
            from: Some("a".to_owned()),
            to: Some("b".to_owned()),
            at: None,
            term: None,
            steps: Vec::new(),
            unreached: Vec::new(),
            write_gap_ms: None,
            error: None,
        }
    }
}

impl Backend for Fake {
    async fn status(&self) -> Answer<Status> {
        self.note("status");
        let store = Store { kind: StoreKind::Raft, leader: None, members: Vec::new() };
        Ok(Status { herd: "shop".to_owned(), generation: 7, store, clusters: Vec::new(), proxy: Vec::new() })
    }

    async fn history(&self, query: HistoryQuery) -> Answer<History> {
        self.note(format!("history of {:?}, {:?}", query.cluster, query.limit));
        Ok(History { entries: Vec::new() })
    }

    async fn explain(&self) -> Answer<Explain> {
        self.note("explain");
        Ok(Explain { nodes: Vec::new() })
    }

    async fn check(&self) -> Answer<CheckReport> {
        self.note("check");
        Ok(CheckReport { checks: Vec::new() })
    }

    async fn spec(&self) -> Answer<Spec> {
        self.note("spec");
        Ok(Spec { generation: 7, text: String::new() })
    }

    async fn plan(&self, _: PlanRequest) -> Answer<Plan> {
        self.note("plan");
        Ok(Plan { generation: 7, changes: Vec::new() })
    }

    async fn apply(&self, operator: &OperatorName, request: ApplyRequest) -> Answer<Applied> {
        self.note(format!("{operator}: apply"));
        match request.generation {
            7 => Ok(Applied { generation: 8, changes: Vec::new() }),
            stale => Err(Error::new(Code::GenerationStale, format!("the plan is for generation {stale}"))),
        }
    }

    async fn switchover(&self, operator: &OperatorName, request: SwitchoverRequest) -> Answer<Change> {
        self.note(format!("{operator}: switchover"));
        Ok(self.change(request.request_id, ChangeKind::Switchover))
    }

    async fn promote(&self, proxy: &NodeName, request: PromoteRequest) -> Answer<Change> {
        self.note(format!("{proxy}: promote {} by {}", request.to, request.role));
        Ok(self.change(request.request_id, ChangeKind::Switchover))
    }

    async fn backup(&self, _: &OperatorName, _: BackupRequest) -> Answer<BackupAsked> {
        Ok(BackupAsked { cluster: "main".to_owned(), number: 1 })
    }

    async fn switchover_cancel(&self, operator: &OperatorName, _: SwitchoverCancelRequest) -> Answer<Change> {
        self.note(format!("{operator}: switchover cancel"));
        Ok(self.change("1".to_owned(), ChangeKind::Switchover))
    }

    async fn failover(&self, operator: &OperatorName, request: FailoverRequest) -> Answer<Change> {
        self.note(format!("{operator}: failover"));
        Ok(self.change(request.request_id, ChangeKind::Failover))
    }

    async fn restore(&self, operator: &OperatorName, request: RestoreRequest) -> Answer<RestoreAnswer> {
        self.note(format!("{operator}: restore"));
        let change = Some(self.change(request.request_id, ChangeKind::Restore));
        Ok(RestoreAnswer { cluster: "main".to_owned(), node: "b".to_owned(), change })
    }

    async fn change(&self, request_id: String) -> Answer<Change> {
        self.note(format!("change {request_id}"));
        Ok(Fake::change(self, request_id, ChangeKind::Switchover))
    }

    async fn logs(&self, query: LogsQuery) -> Answer<BoxStream<'static, LogLine>> {
        self.note(format!("logs of {:?}", query.node));
        let line = |number: u32| LogLine {
            node: "a".to_owned(),
            source: LogSource::Agent,
            at: None,
            text: format!("line {number}\nwith two lines"),
        };
        let lines = stream::iter((0..query.tail.unwrap_or(3)).map(line));
        Ok(match query.follow {
            true => lines.chain(stream::pending()).boxed(),
            false => lines.boxed(),
        })
    }

    async fn routing(&self, query: RoutingQuery) -> Answer<BoxStream<'static, RoutingTable>> {
        self.note(match &query.proxy {
            Some(proxy) => format!(
                "{proxy}: routing of {:?}, {:?} and {:?}",
                query.process, query.listen, query.read_listen
            ),
            None => "routing".to_owned(),
        });
        let stream = Arc::clone(&self.stream);
        let table = RoutingTable {
            herd_id: "4f1c".to_owned(),
            cluster: "main".to_owned(),
            term: 4,
            gate: Gate::Open,
            primary: None,
            standbys: Vec::new(),
            proof: Proof::Store,
            valid_for_ms: 2500,
            drain: None,
            forks: Vec::new(),
        };
        let tables = stream::iter([table]).chain(stream::pending());
        Ok(tables
            .map(move |table| {
                // Held until the stream is dropped.
                let _held = &stream;
                table
            })
            .boxed())
    }

    async fn proxy(&self, query: ProxyQuery) -> Answer<ProxySettings> {
        self.note(format!("proxy of {:?}", query.cluster));
        Ok(ProxySettings {
            herd: "shop".to_owned(),
            cluster: "main".to_owned(),
            generation: 7,
            port: 9999,
            read_port: 9998,
            pool: Pool::Session,
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
            agents: Vec::new(),
        })
    }

    async fn token_create(&self, operator: &OperatorName, _: TokenRequest) -> Answer<Token> {
        self.note(format!("{operator}: token"));
        Ok(Token { token: "t".to_owned(), expires: "2026-11-20T20:54:54Z".to_owned() })
    }

    async fn join(&self, request: JoinRequest) -> Answer<JoinAnswer> {
        self.note(format!("join of {}", request.node));
        match &*self.join.lock().unwrap() {
            Some(answer) => answer(request),
            None => Err(Error::of(Code::TokenInvalid)),
        }
    }

    async fn renew(&self, node: &NodeName, _: RenewRequest) -> Answer<RenewAnswer> {
        self.note(format!("{node}: renew"));
        Ok(RenewAnswer { certificate: String::new(), ca: String::new() })
    }

    async fn operator_add(&self, operator: &OperatorName, _: OperatorRequest) -> Answer<OperatorAnswer> {
        self.note(format!("{operator}: operator add"));
        Err(Error::of(Code::NameTaken))
    }

    async fn proxy_add(&self, operator: &OperatorName, _: ProxyRequest) -> Answer<ProxyAnswer> {
        self.note(format!("{operator}: proxy add"));
        Err(Error::of(Code::NameTaken))
    }

    async fn drained(&self, proxy: &NodeName, request: Drained) -> Answer<()> {
        self.note(format!("{proxy}: drained {}", request.drain));
        Ok(())
    }

    async fn proxy_renew(&self, proxy: &NodeName, _: ProxyRenewRequest) -> Answer<ProxyAnswer> {
        self.note(format!("{proxy}: proxy renew"));
        Ok(ProxyAnswer {
            certificate: String::new(),
            ca: String::new(),
            herd: "shop".to_owned(),
            urls: Vec::new(),
            expires: "2026-11-20T20:54:54Z".to_owned(),
        })
    }

    async fn objects(&self, body: Bytes) -> Answer<Bytes> {
        self.note("objects".to_owned());
        let malformed = |why: String| Error::of(Code::RequestMalformed).because(why);
        let (_, bytes) = objects::split::<objects::Ask>(&body).map_err(malformed)?;
        Ok(objects::join(&objects::Told::Bytes, &bytes))
    }

    async fn wal(&self, from: &NodeName, ask: WalAsk) -> Answer<Bytes> {
        self.note(format!("{from}: wal of timeline {}", ask.timeline));
        Ok(objects::join(&WalTold::Bytes, &vec![7; ask.segment_bytes as usize]))
    }

    async fn raft_rpc(&self, from: &NodeName, rpc: &str, body: Bytes) -> Answer<Bytes> {
        self.note(format!("{from}: raft {rpc}, {} bytes", body.len()));
        Ok(body)
    }

    async fn peer_report(&self, from: &NodeName, body: Bytes) -> Answer<Bytes> {
        self.note(format!("{from}: report"));
        let slow_ms = self.slow_ms.load(Ordering::Relaxed);
        if slow_ms > 0 {
            // sleep: a backend that is slow on purpose.
            tokio::time::sleep(Duration::from_millis(slow_ms)).await;
        }
        Ok(body)
    }

    async fn fenced(&self, message: Fenced) -> Answer<()> {
        self.note(format!("fenced {} in term {}", message.member, message.term));
        Ok(())
    }

    fn health(&self) -> Arc<HealthView> {
        Arc::new(HealthView {
            cluster: "main".to_owned(),
            node: "a".to_owned(),
            role: Role::Primary,
            gate_open: true,
            postgres: Postgres::Running,
            replication_state: None,
            is_voter: false,
            every_voter_needed: true,
            in_read_pool: false,
            primary_lsn: Some(0x500_0060),
            received_lsn: None,
            replayed_lsn: None,
            agent_is_alive: true,
            is_paused: false,
            timeline: Some(4),
            system_identifier: Some("7710".to_owned()),
            server_version: Some(150_014),
            pending_restart: false,
            postmaster_start_time: None,
            store_last_seen_s: None,
        })
    }
}
