//! The backend over a real store of one member, with a main loop that answers what the test says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use pgherd_api::change::{ChangeState, RestoreMoment, RestoreStep};
use pgherd_api::spec::Impact;
use pgherd_api::status::{Gate, ProxyListener, State};
use pgherd_core::observation::Postgres;
use pgherd_core::record::{Moment, NodeRecord, Proposal, Record, Reign, Rule, Rules, Standing, Vote};
use pgherd_core::spec::HerdSpec;
use pgherd_core::types::{Lsn, Member, SystemId, Term, Timeline};
use pgherd_dcs::{Config, Transaction, Transport, TransportError};

use super::renewal::Renewal;
use super::*;
use crate::agreed::{Secrets, StoredSpec, to_json};
use crate::clock;
use crate::gossip::{Is, Show};
use crate::mind::Deeds;
use crate::pki::{
    Authority, CA_VALIDITY, Credentials, NODE_VALIDITY, NewKey, NodeSubject, PROXY_VALIDITY, ServerTls,
    sign_fenced,
};

pub(crate) const HERD: &str = r#"
name = "shop"

[postgres]
version = 15

[[cluster]]
name = "main"

  [[cluster.node]]
  name = "a"
  host = "127.0.0.1"
  [[cluster.node]]
  name = "b"
  host = "127.0.0.2"
  [[cluster.node]]
  name = "c"
  host = "127.0.0.3"
  priority = 0
"#;

const SOON: Duration = Duration::from_secs(30);

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn operator() -> OperatorName {
    "anna".parse().unwrap()
}

fn spec() -> HerdSpec {
    crate::files::herd::read("herd.toml", HERD).unwrap().spec
}

/// Term 4, held by a; b is its voter, c may not lead.
fn record() -> Record {
    Record {
        system: Some(SystemId(7)),
        term: Term(4),
        reign: Some(Reign {
            holder: "a_1".parse().unwrap(),
            timeline: Timeline(2),
            promoted: true,
            elected_at: Lsn::ZERO,
            promoted_at: Lsn(1),
            gate_opened: true,
            predecessor_gone: true,
        }),
        rules: Some(Rules {
            current: Rule {
                needed: 1,
                members: ["a_1", "b_2", "c_3"].map(|member| member.parse().unwrap()).into(),
            },
            next: None,
            superseded: Vec::new(),
            change: 0,
        }),
        nodes: ["a_1", "b_2", "c_3"]
            .map(|member| member.parse::<Member>().unwrap())
            .map(|member| (member.node, NodeRecord { incarnation: member.incarnation, barred: None }))
            .into(),
        ..Record::empty()
    }
}

struct Nobody;

impl Transport for Nobody {
    fn call(
        &self,
        _peer: &NodeName,
        _address: &str,
        _rpc: &'static str,
        _body: Vec<u8>,
        _timeout: Duration,
    ) -> futures_util::future::BoxFuture<'static, Result<Vec<u8>, TransportError>> {
        Box::pin(async { Err(TransportError::NotSent("there is no other member".to_owned())) })
    }
}

pub(crate) struct Scene {
    pub(crate) backend: Arc<AgentBackend>,
    authority: Authority,
    credentials: Credentials,
    dir: tempfile::TempDir,
    gossip: watch::Sender<Gossip>,
    /// What the loop was told, besides questions.
    heard: mpsc::Receiver<Event>,
    /// Who was heard how long ago.
    ages: watch::Sender<BTreeMap<NodeName, Duration>>,
    /// While it holds true the loop answers nothing.
    stuck: watch::Sender<bool>,
}

fn says(node: &str, running: Is) -> Gossip {
    Gossip {
        cluster: name("main"),
        term: Term(4),
        running,
        timeline: Some(Timeline(2)),
        flush_lsn: Some(Lsn(0x300)),
        show: Show {
            reason: "x".to_owned(),
            state: Some(if running == Is::Primary { State::Running } else { State::Streaming }),
            gate_open: running == Is::Primary,
            ..Show::default()
        },
        ..Gossip::silent(&name(node))
    }
}

impl Scene {
    pub(crate) async fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let (authority, key) = Authority::create(&name("shop"), "4f1c4f1c", now, CA_VALIDITY).unwrap();
        let own_key = NewKey::generate().unwrap();
        let node = name("a");
        let hosts = ["db1.example.com".to_owned(), "127.0.0.1".to_owned()];
        let subject = NodeSubject { name: &node, hosts: &hosts, others: &[] };
        let pem = authority.issue_node(&own_key.request().unwrap(), &subject, now, NODE_VALIDITY).unwrap();
        let pki_dir = dir.path().join("pki");
        std::fs::create_dir(&pki_dir).unwrap();
        Credentials::save(&pki_dir, authority.certificate_pem(), &pem, &own_key).unwrap();
        let credentials = Credentials::load(&pki_dir).unwrap();

        let config = Config {
            dir: dir.path().join("raft"),
            herd: "4f1c4f1c".to_owned(),
            name: node.clone(),
            address: "127.0.0.1:1".to_owned(),
            host: "127.0.0.1".to_owned(),
            times: pgherd_dcs::Times {
                heartbeat: Duration::from_millis(50),
                election: Duration::from_millis(400),
            },
        };
        let raft = RaftStore::create(config, Arc::new(Nobody)).await.unwrap();
        let store = Store::from(raft.clone());
        let secrets = Secrets::generate(&spec(), authority.certificate_pem(), &key).unwrap();
        let first = Transaction::new()
            .put(agreed::SPEC, to_json("", &StoredSpec { generation: 1, spec: spec() }).unwrap())
            .put(agreed::SECRETS, to_json("", &secrets).unwrap())
            .put(agreed::cluster_key(&name("main")), to_json("", &record()).unwrap());
        store.commit(first, SOON).await.unwrap();

        let identity = Identity::new(
            name("shop"),
            "4f1c4f1c".to_owned(),
            node.clone(),
            "127.0.0.1:1".to_owned(),
            "127.0.0.1".to_owned(),
            None,
        );
        let (events, asked) = mpsc::channel(16);
        let (tell, heard) = mpsc::channel(16);
        let (gossip, own_gossip) = watch::channel(says("a", Is::Primary));
        let ages = BTreeMap::from([(name("b"), Duration::ZERO), (name("c"), Duration::ZERO)]);
        let (ages, seen_ages) = watch::channel(ages);
        let (stuck, seen_stuck) = watch::channel(false);
        tokio::spawn(answer(asked, tell, store.clone(), own_gossip.clone(), seen_ages, seen_stuck));
        let backend = Arc::new(AgentBackend {
            raft,
            store,
            events,
            own_gossip,
            peers: Peers::new(node, Arc::new(credentials.client_tls().unwrap())),
            identity,
            state_dir: dir.path().to_owned(),
            authorities: authority.certificate_pem().to_owned(),
            health: ArcSwapOption::default(),
            metrics: Arc::new(Metrics::new("shop", None, "a")),
            routes: watch::channel(None).0,
            certificate_expires: ArcSwap::from_pointee(credentials.expires()),
            changes: Mutex::default(),
            listeners: Listeners::default(),
            instance: std::sync::OnceLock::new(),
            spec: std::sync::OnceLock::new(),
        });
        Scene { backend, authority, credentials, dir, gossip, heard, ages, stuck }
    }

    async fn propose(&self, proposal: Proposal) {
        agreed::propose(&self.backend.store, &name("main"), &proposal, SOON).await.unwrap();
    }

    fn record(&self) -> Record {
        agreed::record(&local_view(&self.backend.store), &name("main")).unwrap().0
    }

    fn switchover(&self, id: &str, to: Option<&str>) -> impl Future<Output = Answer<Change>> {
        let backend = Arc::clone(&self.backend);
        let request = SwitchoverRequest {
            request_id: id.to_owned(),
            cluster: None,
            to: to.map(str::to_owned),
            at: None,
        };
        async move { backend.switchover(&operator(), request).await }
    }

    fn failover(&self, to: &str, accept_data_loss: bool) -> impl Future<Output = Answer<Change>> {
        let backend = Arc::clone(&self.backend);
        let request = FailoverRequest {
            request_id: "f".to_owned(),
            cluster: None,
            to: to.to_owned(),
            accept_data_loss,
        };
        async move { backend.failover(&operator(), request).await }
    }
}

/// The main loop, as far as the backend sees it.
async fn answer(
    mut asked: mpsc::Receiver<Event>,
    tell: mpsc::Sender<Event>,
    store: Store,
    own: watch::Receiver<Gossip>,
    ages: watch::Receiver<BTreeMap<NodeName, Duration>>,
    mut stuck: watch::Receiver<bool>,
) {
    while let Some(event) = asked.recv().await {
        stuck.wait_for(|stuck| !stuck).await.unwrap();
        let Event::Ask(answer) = event else {
            tell.send(event).await.unwrap();
            continue;
        };
        let snapshot = local_view(&store);
        let stored: StoredSpec = agreed::value(&snapshot, agreed::SPEC).unwrap().unwrap().0;
        let now = clock::now();
        let peers = ages.borrow().clone();
        let peers = peers.into_iter().map(|(node, age)| {
            let gossip = says(node.as_str(), Is::Standby);
            (node, Some(age), Some(gossip))
        });
        let picture = Picture {
            started: None,
            now,
            own: own.borrow().clone(),
            peers: peers.collect(),
            postgres: Postgres::Unknown,
            deeds: Deeds { gate_open: own.borrow().show.gate_open, ..Deeds::default() },
            confirmed: Some(now),
            heartbeat: None,
            drain: None,
            store_reachable: true,
            spec_generation: stored.generation,
            spec: stored.spec,
            record: Some(agreed::record(&snapshot, &name("main")).unwrap().0),
        };
        // Whoever asked may have given up.
        drop(answer.send(Box::new(picture)));
    }
}

fn is<T: std::fmt::Debug>(answer: Answer<T>, code: Code) -> Error {
    let error = answer.unwrap_err();
    assert!(error.is(code), "{error:?} is not {code}");
    assert!(error.hint.is_some(), "{error:?}");
    error
}

#[test]
fn an_agent_that_has_just_started_leaves_the_answer_to_the_others() {
    let at = |seconds| Instant::from_boot(Duration::from_secs(seconds));
    assert!(is_young(None, at(100)), "before its first thought");
    assert!(is_young(Some(at(99)), at(100)) && !is_young(Some(at(90)), at(100)));
}

fn sealed(member: &str) -> Proposal {
    Proposal::Vote {
        term: Term(5),
        vote: Vote {
            member: member.parse().unwrap(),
            standing: Standing::Sealed,
            position: pgherd_core::record::Position { term: Term(4), lsn: Lsn(0x300) },
            timeline: Timeline(2),
            begins: Vec::new(),
            electable: true,
            priority: 100,
        },
    }
}

#[tokio::test]
async fn a_switchover_is_asked_for_once_and_followed_to_its_end() {
    let scene = Scene::new().await;
    let begun = scene.switchover("s", Some("b")).await.unwrap();
    assert_eq!(
        (begun.state, begun.from.as_deref(), begun.to.as_deref()),
        (ChangeState::Running, Some("a"), Some("b"))
    );
    assert_eq!(scene.record().switchover.unwrap().to, Some(name("b")));
    // The same request again joins the one under way; another one does not get in between.
    assert_eq!(scene.switchover("s", Some("b")).await.unwrap(), begun);
    is(scene.switchover("t", None).await, Code::ChangeInProgress);

    let release = Proposal::Open {
        term: Term(4),
        cause: pgherd_core::record::Cause::Switchover,
        by: name("a"),
        released: true,
        poisoned: false,
    };
    scene.propose(release).await;
    scene.propose(sealed("b_2")).await;
    scene.propose(sealed("a_1")).await;
    scene.propose(sealed("c_3")).await;
    scene.propose(Proposal::Promoted { term: Term(5), begin: Lsn(0x300), at: Lsn(0x340) }).await;
    assert_eq!(scene.backend.change("s".to_owned()).await.unwrap().state, ChangeState::Running);
    scene.propose(Proposal::GateOpened { term: Term(5) }).await;
    let done = scene.backend.change("s".to_owned()).await.unwrap();
    assert_eq!((done.state, done.term, done.to.as_deref()), (ChangeState::Done, Some(5), Some("b")));
    let steps: Vec<&str> = done.steps.iter().map(|step| step.what.as_str()).collect();
    assert!(steps[0].starts_with("an operator asked for a switchover to b"), "{steps:?}");
    assert!(steps.last().unwrap().starts_with("clients are let in"), "{steps:?}");
    assert_eq!(scene.backend.change("s".to_owned()).await.unwrap(), done);
    is(scene.backend.change("none".to_owned()).await, Code::ChangeUnknown);
}

#[tokio::test]
async fn a_switchover_that_cannot_be_is_refused_with_the_reason() {
    let scene = Scene::new().await;
    assert!(
        is(scene.switchover("s", Some("a")).await, Code::TargetNotElectable)
            .message
            .contains("is the primary")
    );
    assert!(
        is(scene.switchover("s", Some("c")).await, Code::TargetNotElectable)
            .message
            .contains("never promoted")
    );
    is(scene.switchover("s", Some("x")).await, Code::NodeUnknown);
    scene.propose(Proposal::Bar { node: name("b"), why: Some("a checksum failed".to_owned()) }).await;
    let barred = is(scene.switchover("s", Some("b")).await, Code::TargetNotElectable);
    assert!(barred.message.contains("a checksum failed"), "{barred:?}");
    assert_eq!(scene.record().switchover, None);
    let nothing = SwitchoverCancelRequest { cluster: None };
    is(scene.backend.switchover_cancel(&operator(), nothing).await, Code::ChangeUnknown);
}

#[tokio::test]
async fn a_proxy_asks_for_a_switchover_only_for_a_role_that_the_herd_file_names() {
    let scene = Scene::new().await;
    let promote = async |role: &str| {
        let (request_id, to, role) = ("p".to_owned(), "b".to_owned(), role.to_owned());
        let request = PromoteRequest { request_id, cluster: Some("main".to_owned()), to, role };
        scene.backend.promote(&name("front"), request).await
    };
    let nobody = is(promote("ops").await, Code::CredentialsInsufficient);
    assert!(nobody.message.contains("console_admins of cluster main does not name"), "{nobody:?}");
    let text = HERD.replace("[[cluster]]", "[proxy]\nconsole_admins = [\"ops\"]\n\n[[cluster]]");
    let spec = crate::files::herd::read("herd.toml", &text).unwrap().spec;
    let next = to_json("", &StoredSpec { generation: 2, spec }).unwrap();
    scene.backend.store.commit(Transaction::new().put(agreed::SPEC, next), SOON).await.unwrap();
    is(promote("app").await, Code::CredentialsInsufficient);
    assert_eq!(scene.record().switchover, None);
    assert_eq!(promote("ops").await.unwrap().to.as_deref(), Some("b"));
    assert_eq!(scene.record().switchover.unwrap().to, Some(name("b")));
}

#[tokio::test]
async fn a_switchover_is_cancelled_while_it_waits() {
    let scene = Scene::new().await;
    scene.switchover("s", Some("b")).await.unwrap();
    let request = SwitchoverCancelRequest { cluster: Some("main".to_owned()) };
    let cancelled = scene.backend.switchover_cancel(&operator(), request).await.unwrap();
    assert_eq!((cancelled.request_id.as_str(), cancelled.state), ("s", ChangeState::Cancelled));
    assert_eq!(scene.record().switchover, None);
}

#[tokio::test]
async fn a_forced_failover_says_what_is_at_risk_and_whom_it_could_not_reach() {
    let scene = Scene::new().await;
    scene.ages.send_modify(|ages| {
        ages.insert(name("b"), Duration::from_secs(60));
    });
    let refused = is(scene.failover("c", false).await, Code::DataLossNotAccepted);
    assert!(refused.cause.unwrap().ends_with("only on b"));
    assert_eq!(scene.record().election, None, "nothing was changed");
    is(scene.failover("b", true).await, Code::TargetNotElectable);
    let forced = scene.failover("c", true).await.unwrap();
    assert_eq!((forced.unreached.as_slice(), forced.to.as_deref()), (["b".to_owned()].as_slice(), Some("c")));
    assert_eq!(scene.record().election.unwrap().forced, Some(name("c")));
}

#[tokio::test]
async fn a_restore_of_the_cluster_goes_one_step_at_a_time() {
    let scene = Scene::new().await;
    let step = |id: &str, step: RestoreStep| {
        let request = RestoreRequest { request_id: id.to_owned(), cluster: None, step };
        let backend = Arc::clone(&scene.backend);
        async move { backend.restore(&operator(), request).await }
    };
    let moment = RestoreMoment {
        backup: "20261120T205454".to_owned(),
        timeline: 2,
        end_lsn: "0/200".to_owned(),
        along: 2,
    };
    let hold =
        |node: Option<&str>| RestoreStep::Hold { node: node.map(str::to_owned), moment: moment.clone() };
    is(step("1", hold(Some("b"))).await, Code::RepositoryMissing);
    is(step("2", RestoreStep::Lead).await, Code::ChangeUnknown);
    is(step("3", RestoreStep::LetGo).await, Code::ChangeUnknown);
    let agreed =
        Moment { backup: moment.backup.clone(), timeline: Timeline(2), end: Lsn(0x200), along: Timeline(2) };
    scene.propose(Proposal::Restore { order: Some((name("b"), agreed)) }).await;
    let joined = step("4", hold(None)).await.unwrap();
    assert_eq!((joined.node.as_str(), joined.change), ("b", None), "it is asked for twice");
    let other = RestoreMoment { end_lsn: "0/208".to_owned(), ..moment.clone() };
    is(step("5", RestoreStep::Hold { node: None, moment: other }).await, Code::ChangeInProgress);
    is(step("6", RestoreStep::Lead).await, Code::NotReady);
    assert_eq!(scene.record().election, None);
    assert_eq!(step("7", RestoreStep::LetGo).await.unwrap().node, "b");
    assert_eq!(scene.record().restore, None);
}

#[tokio::test]
async fn a_herd_file_is_applied_only_as_it_was_planned() {
    let scene = Scene::new().await;
    let text = HERD.replace("version = 15", "version = 15\nparameters = { work_mem = \"8MB\" }");
    let plan = scene.backend.plan(PlanRequest { text: text.clone(), file: None }).await.unwrap();
    assert_eq!((plan.generation, plan.changes.len()), (1, 1));
    assert_eq!(plan.changes[0].impact, Impact::Reload);
    let apply = |text: &str, generation, accept| {
        let request = ApplyRequest { text: text.to_owned(), file: None, generation, accept };
        let backend = Arc::clone(&scene.backend);
        async move { backend.apply(&operator(), request).await }
    };
    is(apply(&text, 1, Impact::None).await, Code::ImpactNotAccepted);
    is(apply(&text, 2, Impact::Reload).await, Code::GenerationStale);
    assert_eq!(apply(&text, 1, Impact::Reload).await.unwrap().generation, 2);
    is(apply(&text, 1, Impact::Reload).await, Code::GenerationStale);
    assert_eq!(apply(&text, 2, Impact::None).await.unwrap().generation, 2, "nothing is left to do");
    let spec = scene.backend.spec().await.unwrap();
    assert_eq!(spec.generation, 2);
    assert!(spec.text.contains("work_mem"));
    let wrong = is(apply("name = 1", 2, Impact::Destroy).await, Code::SpecInvalid);
    assert!(wrong.cause.unwrap().contains("herd.toml:1:"));
}

#[tokio::test]
async fn a_token_admits_one_node_once_and_an_answer_that_was_lost_is_given_again() {
    let scene = Scene::new().await;
    let token = |node: Option<&str>| {
        let request = TokenRequest { node: node.map(str::to_owned), valid_for_s: 600 };
        let backend = Arc::clone(&scene.backend);
        async move { backend.token_create(&operator(), request).await }
    };
    is(token(Some("x")).await, Code::NodeUnknown);
    let token = token(Some("b")).await.unwrap().token;
    let key = NewKey::generate().unwrap();
    let request = |node: &str, key: &NewKey| JoinRequest {
        token: token.clone(),
        node: node.to_owned(),
        csr: key.request().unwrap(),
        hosts: vec!["127.0.0.2".to_owned()],
        api_address: "127.0.0.2:8009".to_owned(),
        host: "127.0.0.2".to_owned(),
        store_disk: "00112233445566778899aabbccddeeff".to_owned(),
        version: "0.1.0".to_owned(),
    };
    is(scene.backend.join(request("c", &key)).await, Code::TokenInvalid);
    let joined = scene.backend.join(request("b", &key)).await.unwrap();
    assert_eq!((joined.herd.as_str(), joined.herd_id.as_str()), ("shop", "4f1c4f1c"));
    assert!(joined.secrets.is_empty(), "what it needs it reads as a member");
    let again = scene.backend.join(request("b", &key)).await.unwrap();
    assert_eq!(again.raft_id, joined.raft_id);
    is(scene.backend.join(request("b", &NewKey::generate().unwrap())).await, Code::TokenUsed);
    let mut garbage = request("b", &key);
    garbage.token.push('x');
    is(scene.backend.join(garbage).await, Code::TokenInvalid);
}

#[tokio::test]
async fn an_operators_certificate_ends_no_later_than_the_authority() {
    let scene = Scene::new().await;
    let request = OperatorRequest {
        name: "bert".to_owned(),
        csr: NewKey::generate().unwrap().request().unwrap(),
        valid_for_s: 1_000_000_000_000,
    };
    let answer = scene.backend.operator_add(&operator(), request).await.unwrap();
    assert_eq!(answer.expires.parse::<Timestamp>().unwrap(), scene.authority.expires());
    assert_eq!(answer.urls[1], "https://127.0.0.2:8009");
}

#[tokio::test]
async fn a_proxy_gets_a_certificate_and_asks_for_the_next_one_itself() {
    let scene = Scene::new().await;
    let directory = tempfile::tempdir().unwrap();
    let key = NewKey::generate().unwrap();
    let request = |name: &str, host: &str| ProxyRequest {
        name: name.to_owned(),
        csr: key.request().unwrap(),
        hosts: vec!["127.0.0.1".to_owned(), host.to_owned()],
        valid_for_s: 86_400,
    };
    let answer = scene.backend.proxy_add(&operator(), request("up", "db.example.com")).await.unwrap();
    assert_eq!((answer.herd.as_str(), answer.urls[1].as_str()), ("shop", "https://127.0.0.2:8009"));
    Credentials::save(directory.path(), &answer.ca, &answer.certificate, &key).unwrap();
    let first = Credentials::load(directory.path()).unwrap();
    assert_eq!(first.identity(), &pgherd_api::identity::Identity::Proxy("up".to_owned()));
    assert_eq!(first.valid_for(), Duration::from_secs(86_400));
    assert_eq!(first.hosts(), ["127.0.0.1", "db.example.com"]);
    assert_eq!(answer.expires.parse::<Timestamp>().unwrap().as_second(), first.expires().as_second());

    let renewal = ProxyRenewRequest {
        csr: first.renewal_request().unwrap(),
        hosts: first.hosts(),
        valid_for_s: u64::MAX,
    };
    let answer = scene.backend.proxy_renew(&name("up"), renewal).await.unwrap();
    let renewed = first.renew(directory.path(), &answer.certificate).unwrap();
    assert_eq!(renewed.hosts(), first.hosts());
    assert_eq!(renewed.valid_for(), PROXY_VALIDITY, "however long was asked for");

    is(scene.backend.proxy_add(&operator(), request("Up!", "x")).await, Code::RequestMalformed);
    // PostgreSQL's clients in the herd would take it for the node.
    is(scene.backend.proxy_add(&operator(), request("up", "b")).await, Code::CertificateRequestInvalid);
    is(scene.backend.proxy_add(&operator(), request("up", "*")).await, Code::CertificateRequestInvalid);
}

#[tokio::test]
async fn a_proxy_is_told_what_the_newest_specification_says() {
    let scene = Scene::new().await;
    let ask = |cluster: Option<&str>| scene.backend.proxy(ProxyQuery { cluster: cluster.map(str::to_owned) });
    let before = ask(None).await.unwrap();
    assert_eq!((before.generation, before.port, before.read_port), (1, 9999, 9998));
    assert_eq!((before.herd.as_str(), before.cluster.as_str(), before.hba.len()), ("shop", "main", 0));
    assert_eq!(before.agents.len(), 3);
    is(ask(Some("other")).await, Code::ClusterUnknown);

    let changed = HERD.replace(
        "version = 15",
        "version = 15\nhba = [\"host all all 10.0.0.0/8 scram-sha-256\"]\n[proxy]\nport = 6432",
    );
    let request = ApplyRequest { text: changed, file: None, generation: 1, accept: Impact::Reload };
    let applied = scene.backend.apply(&operator(), request).await.unwrap();
    assert!(applied.changes.iter().any(|change| change.path == "cluster.main.proxy.port"), "{applied:?}");
    let after = ask(Some("main")).await.unwrap();
    assert_eq!((after.generation, after.port, after.read_port), (2, 6432, 9998));
    assert_eq!(after.hba, ["host all all 10.0.0.0/8 scram-sha-256"]);
}

#[tokio::test]
async fn status_lists_where_proxies_listen_for_as_long_as_they_follow() {
    let scene = Scene::new().await;
    let listed = async || {
        let listeners = scene.backend.status().await.unwrap().proxy;
        let text = |of: &ProxyListener| format!("{} {} {:?}", of.cluster, of.listen, of.target);
        listeners.iter().map(text).collect::<Vec<String>>()
    };
    let query = |name: &str, port: u16| RoutingQuery {
        cluster: Some("main".to_owned()),
        proxy: Some(name.to_owned()),
        process: None,
        listen: Some(format!("127.0.0.1:{port}")),
        read_listen: Some(format!("[::1]:{}", port - 1)),
    };
    let none: [&str; 0] = [];
    assert_eq!(listed().await, none);
    let first = scene.backend.routing(query("up", 9999)).await.unwrap();
    let both = ["main 127.0.0.1:9999 ReadWrite", "main [::1]:9998 ReadOnly"];
    assert_eq!(listed().await, both);
    // It has lost its connection without knowing, and comes again.
    let again = scene.backend.routing(query("up", 9999)).await.unwrap();
    assert_eq!(listed().await, both);
    drop(first);
    assert_eq!(listed().await, both);
    // It listens there no more, and follows nevertheless.
    let retired = RoutingQuery { listen: None, read_listen: None, ..query("up", 9999) };
    let retired = scene.backend.routing(retired).await.unwrap();
    assert_eq!(listed().await, none);
    drop(retired);
    let once_more = scene.backend.routing(query("up", 9999)).await.unwrap();
    assert_eq!(listed().await, both);
    let other = scene.backend.routing(query("b", 7001)).await.unwrap();
    assert_eq!(listed().await.len(), 4);
    drop((again, once_more));
    assert_eq!(listed().await, ["main 127.0.0.1:7001 ReadWrite", "main [::1]:7000 ReadOnly"]);
    drop(other);
    assert_eq!(listed().await, none);

    // Whoever only reads the table is not listed, nor one that says no address.
    let reader = scene.backend.routing(RoutingQuery { proxy: None, ..query("x", 1000) }).await.unwrap();
    let silent = scene.backend.routing(RoutingQuery { listen: None, read_listen: None, ..query("x", 1000) });
    let silent = silent.await.unwrap();
    assert_eq!(listed().await, none);
    drop((reader, silent));
    for wrong in ["9999", "localhost:9999", "127.0.0.1:9999 for you"] {
        let query = RoutingQuery { listen: Some(wrong.to_owned()), ..query("up", 9999) };
        is(scene.backend.routing(query).await.map(drop), Code::RequestMalformed);
    }
    let elsewhere = RoutingQuery { cluster: Some("other".to_owned()), ..query("up", 9999) };
    is(scene.backend.routing(elsewhere).await.map(drop), Code::ClusterUnknown);
    assert_eq!(listed().await, none);
}

#[tokio::test]
async fn a_report_counts_only_for_the_node_whose_certificate_brought_it() {
    let mut scene = Scene::new().await;
    let body = |node: &str| Bytes::from(serde_json::to_vec(&says(node, Is::Standby)).unwrap());
    is(scene.backend.peer_report(&name("b"), body("c")).await, Code::CredentialsInsufficient);
    is(scene.backend.peer_report(&name("b"), Bytes::from_static(b"{")).await, Code::RequestMalformed);
    let own = scene.backend.peer_report(&name("b"), body("b")).await.unwrap();
    assert_eq!(serde_json::from_slice::<Gossip>(&own).unwrap().node, name("a"));
    let Some(Event::Heard { gossip, .. }) = scene.heard.recv().await else { panic!() };
    assert_eq!(gossip.node, name("b"));
}

#[tokio::test]
async fn the_fences_message_gives_the_term_back() {
    let scene = Scene::new().await;
    let sign = |member: &str, term| {
        let member = member.parse().unwrap();
        sign_fenced(&scene.credentials, "4f1c4f1c", &name("main"), &member, Term(term)).unwrap()
    };
    is(scene.backend.fenced(sign("b_2", 4)).await, Code::SignatureInvalid);
    is(scene.backend.fenced(sign("a_1", 3)).await, Code::TermStale);
    scene.backend.fenced(sign("a_1", 4)).await.unwrap();
    assert!(scene.record().election.unwrap().released);
}

#[tokio::test]
async fn a_drain_is_done_when_every_proxy_that_follows_has_said_so_of_this_one() {
    let scene = Scene::new().await;
    let follow = |proxy: &str| RoutingQuery { proxy: Some(proxy.to_owned()), ..RoutingQuery::default() };
    let is_done = async |drain: u64| {
        let waits = scene.backend.listeners.all_drained(drain);
        tokio::time::timeout(Duration::from_millis(20), waits).await.is_ok()
    };
    let says = async |proxy: &str, drain: u64| {
        scene.backend.drained(&name(proxy), Drained { drain, process: None }).await.unwrap();
    };
    assert!(is_done(7).await, "nobody follows");
    says("up", 7).await;
    let up = scene.backend.routing(follow("up")).await.unwrap();
    let other = scene.backend.routing(follow("other")).await.unwrap();
    says("other", 7).await;
    assert!(!is_done(7).await, "what is said before it follows is not heard");
    says("up", 6).await;
    assert!(!is_done(7).await, "that was another drain");
    let waits = tokio::spawn({
        let listeners = scene.backend.listeners.clone();
        async move { listeners.all_drained(7).await }
    });
    says("up", 7).await;
    tokio::time::timeout(SOON, waits).await.unwrap().unwrap();
    assert!(!is_done(8).await);
    drop(other);
    says("up", 8).await;
    assert!(is_done(8).await, "nobody waits for one that is gone");
    // It has lost its connection without knowing, and comes again.
    let again = scene.backend.routing(follow("up")).await.unwrap();
    drop(up);
    assert!(is_done(8).await);
    drop(again);
    let _back = scene.backend.routing(follow("up")).await.unwrap();
    assert!(!is_done(8).await, "it is another process, and knows nothing of it");
}

/// While one process of a proxy takes over from another one, both have clients.
#[tokio::test]
async fn what_one_process_of_a_proxy_has_drained_the_other_has_not() {
    let scene = Scene::new().await;
    let follow = async |process: &str| {
        let (proxy, process) = (Some("up".to_owned()), Some(process.to_owned()));
        scene.backend.routing(RoutingQuery { proxy, process, ..RoutingQuery::default() }).await.unwrap()
    };
    let is_done = async |drain: u64| {
        let waits = scene.backend.listeners.all_drained(drain);
        tokio::time::timeout(Duration::from_millis(20), waits).await.is_ok()
    };
    let says = async |process: &str, drain: u64| {
        let drained = Drained { drain, process: Some(process.to_owned()) };
        scene.backend.drained(&name("up"), drained).await.unwrap();
    };
    let (former, _successor) = (follow("first").await, follow("second").await);
    says("second", 7).await;
    says("second", 7).await;
    assert!(!is_done(7).await, "the first one still has transactions");
    says("first", 7).await;
    assert!(is_done(7).await);
    says("second", 8).await;
    assert!(!is_done(8).await);
    drop(former);
    assert!(is_done(8).await, "it has ended, and its clients before it");
}

#[tokio::test]
async fn proxies_are_told_at_once_and_a_stuck_loop_lets_nobody_through() {
    let scene = Scene::new().await;
    tokio::spawn(Arc::clone(&scene.backend).keep_shown());
    let mut tables = scene.backend.routing(RoutingQuery::default()).await.unwrap();
    let next = async |tables: &mut BoxStream<'static, RoutingTable>| {
        tokio::time::timeout(SOON, tables.next()).await.unwrap().unwrap()
    };
    let first = next(&mut tables).await;
    assert_eq!((first.term, first.gate), (4, Gate::Open));
    assert_eq!(first.primary.unwrap().address, "127.0.0.1");
    assert!(first.valid_for_ms <= 3_000 && first.valid_for_ms > 2_000);
    assert!(scene.backend.health().gate_open);

    scene.gossip.send_modify(|own| own.show.gate_open = false);
    while next(&mut tables).await.gate == Gate::Open {}
    assert!(!scene.backend.health().gate_open);
    scene.gossip.send_modify(|own| own.show.gate_open = true);
    while next(&mut tables).await.gate == Gate::Closed {}

    scene.stuck.send_replace(true);
    let health = || scene.backend.health();
    let until = tokio::time::Instant::now() + SOON;
    while health().agent_is_alive || health().gate_open {
        assert!(tokio::time::Instant::now() < until, "{:?}", health());
        // sleep: the view is made anew several times a second.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    is(scene.backend.status().await, Code::NotReady);
    scene.stuck.send_replace(false);
    while !health().gate_open {
        assert!(tokio::time::Instant::now() < until, "{:?}", health());
        // sleep: as above.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_certificate_is_renewed_in_its_last_third_with_the_same_names() {
    let scene = Scene::new().await;
    let renewal = Renewal {
        pki_dir: scene.dir.path().join("pki"),
        server: Arc::new(ServerTls::new(&scene.credentials).unwrap()),
        clients: Arc::new(scene.credentials.client_tls().unwrap()),
    };
    let now = Timestamp::now();
    assert_eq!(scene.backend.renew_own(&renewal, now).await.unwrap(), None);
    // Years later; what is issued begins now, so its end lies as far ahead as the first one's.
    let late = Timestamp::from_second(now.as_second() + 4 * 365 * 86_400).unwrap();
    let expires = scene.backend.renew_own(&renewal, late).await.unwrap().unwrap();
    let renewed = Credentials::load(&renewal.pki_dir).unwrap();
    assert_eq!(renewed.expires(), expires);
    assert_eq!(**scene.backend.certificate_expires.load(), expires);
    assert_ne!(renewed.certificate_pem(), scene.credentials.certificate_pem());
    assert_eq!(renewed.hosts(), ["db1.example.com", "127.0.0.1"]);
}

#[tokio::test]
async fn another_nodes_log_is_asked_for_at_that_node() {
    let scene = Scene::new().await;
    let query = |node: &str| LogsQuery { node: Some(node.to_owned()), ..LogsQuery::default() };
    is(scene.backend.logs(query("x")).await.map(drop), Code::NodeUnknown);
    // Nobody listens there; the error is that of the way to the node and names it.
    let unreachable = is(scene.backend.logs(query("b")).await.map(drop), Code::PeerUnreachable);
    assert!(unreachable.message.contains("b (127.0.0.2:8009)"), "{unreachable:?}");
    std::fs::create_dir(crate::paths::log_dir(scene.dir.path())).unwrap();
    std::fs::write(crate::paths::agent_log(scene.dir.path()), "one\ntwo\nthree\n").unwrap();
    let own = LogsQuery { tail: Some(2), ..LogsQuery::default() };
    let lines: Vec<String> = scene.backend.logs(own).await.unwrap().map(|line| line.text).collect().await;
    assert_eq!(lines, ["two", "three"]);
}
