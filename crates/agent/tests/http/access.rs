//! Every route with every kind of credential.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pgherd_agent::http::{Api, Stop, bind_socket, serve_socket};
use pgherd_agent::pki::Credentials;
use pgherd_api::client::{CaPin, ClientTls, Request};
use pgherd_api::route::{self, Access, Method, Route};
use pgherd_api::wal::{WalAsk, WalTold, WalWanted};
use pgherd_api::{CallError, Client, Code, objects};

use crate::fake::Fake;
use crate::herd::{Herd, Server, YEAR, days_ago};

/// A body that no route takes: whoever is let in is told so, and nothing is done.
fn request(route: &Route) -> Request {
    let path = route.with("x");
    match route.method {
        Method::Get => Request::get(path),
        Method::Post => Request::post(path, "\"not an object\"".into()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    LetIn,
    Unauthorized,
    Forbidden,
    NoHandshake,
}

async fn outcome(client: &Client, route: &Route) -> Outcome {
    let answer = match route.path {
        "/v1/logs" | "/v1/routing" => client.stream::<serde_json::Value>(request(route)).await.map(|_| ()),
        _ => client.send(request(route)).await.map(|_| ()),
    };
    match answer {
        Ok(()) => Outcome::LetIn,
        Err(CallError::Answered { http_status: 401, error, .. }) => {
            assert!(error.is(Code::CredentialsMissing), "{error:?}");
            Outcome::Unauthorized
        }
        Err(CallError::Answered { http_status: 403, error, .. }) => {
            assert!(error.is(Code::CredentialsInsufficient), "{error:?}");
            Outcome::Forbidden
        }
        Err(CallError::Answered { http_status: 400, error, .. }) => {
            assert!(error.is(Code::RequestMalformed), "{error:?}");
            Outcome::LetIn
        }
        // The server's alert may be lost when its reset overtakes it.
        Err(CallError::NotTrusted { .. } | CallError::Broken { .. }) => Outcome::NoHandshake,
        Err(other) => panic!("{}: {other:?}", route.path),
    }
}

fn expected(access: Access, caller: &str) -> Outcome {
    match (caller, access) {
        ("wrong authority" | "expired" | "not yet valid", _) => Outcome::NoHandshake,
        (_, Access::Anyone) => Outcome::LetIn,
        ("nobody", _) => Outcome::Unauthorized,
        ("node", Access::Member | Access::Follower | Access::Node) => Outcome::LetIn,
        ("operator", Access::Member | Access::Follower | Access::Operator) => Outcome::LetIn,
        ("proxy", Access::Follower | Access::Proxy) => Outcome::LetIn,
        ("node" | "operator" | "proxy", _) => Outcome::Forbidden,
        (caller, access) => panic!("no rule for {caller} and {access:?}"),
    }
}

/// A proxy stands where clients reach it. What it may ask for is a list to be thought about.
const OPEN_TO_PROXIES: [&str; 7] = [
    "/v1/routing",
    "/v1/proxy",
    "/v1/drained",
    // Only for roles that the herd file names.
    "/v1/promote",
    "/v1/proxies/renew",
    "/v1/join",
    "/v1/fenced",
];

#[tokio::test]
async fn each_route_lets_in_exactly_those_that_it_names() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let anonymous = Arc::new(ClientTls::pinned(herd.authority.pin()));
    let tomorrow_and_more = Timestamp::from_second(Timestamp::now().as_second() + 10 * 86400).unwrap();
    let of = |credentials: Credentials| server.client(&credentials);
    let callers = [
        ("nobody", Client::tls(server.address.to_string(), Some("a"), anonymous)),
        ("wrong authority", of(herd.stranger("b"))),
        ("expired", of(herd.node_made("b", days_ago(20), Duration::from_secs(86400)))),
        ("not yet valid", of(herd.node_made("b", tomorrow_and_more, YEAR))),
        ("node", of(herd.node("b"))),
        ("operator", of(herd.operator("anna"))),
        ("proxy", of(herd.proxy("up"))),
    ];
    for (caller, client) in &callers {
        for route in route::ALL {
            let found = outcome(client, route).await;
            assert_eq!(
                found,
                expected(route.access, caller),
                "{caller} at {} {}",
                route.method.as_str(),
                route.path
            );
        }
    }
    let open_to_proxies: Vec<&str> = route::ALL
        .iter()
        .filter(|route| expected(route.access, "proxy") == Outcome::LetIn)
        .map(|route| route.path)
        .collect();
    assert_eq!(open_to_proxies, OPEN_TO_PROXIES, "beside what is open to anyone");
    let touched = server.backend.calls.lock().unwrap().clone();
    assert!(!touched.iter().any(|call| call.starts_with("wrong")), "{touched:?}");
}

/// Nothing is said about what exists to somebody without a certificate.
#[tokio::test]
async fn unknown_addresses_and_methods_are_not_discussed_with_strangers() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let nobody =
        Client::tls(server.address.to_string(), Some("a"), Arc::new(ClientTls::pinned(herd.authority.pin())));
    let node = server.client(&herd.node("b"));
    let status = |outcome: Result<bytes::Bytes, CallError>| match outcome {
        Err(CallError::Answered { http_status, error, .. }) => (http_status, error.code),
        other => panic!("{other:?}"),
    };
    for (request, code) in [
        (Request::get("/v1/secrets"), Code::RouteUnknown),
        (Request::get("/"), Code::RouteUnknown),
        (Request::post("/v1/status", "{}".into()), Code::MethodNotAllowed),
        (Request::get("/v1/join"), Code::MethodNotAllowed),
    ] {
        assert_eq!(status(nobody.send(request.clone()).await), (401, "PGH-CREDENTIALS-MISSING".to_owned()));
        assert_eq!(status(node.send(request).await), (code.http_status(), code.as_str().to_owned()));
    }
}

#[tokio::test]
async fn a_segment_of_any_size_comes_from_a_node() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let node = server.client(&herd.node("b"));
    let wanted = WalWanted::Segment { number: 7 };
    let ask =
        |segment_bytes| WalAsk { system_identifier: "42".to_owned(), timeline: 3, segment_bytes, wanted };
    // Larger than any other answer.
    let (told, bytes) = node.wal(&ask(64 << 20)).await.unwrap();
    assert_eq!((told, bytes.len()), (WalTold::Bytes, 64 << 20));
    assert_eq!(server.backend.calls.lock().unwrap().last().unwrap(), "b: wal of timeline 3");
}

#[tokio::test]
async fn an_object_that_is_larger_than_any_other_body_goes_there_and_back() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let node = server.client(&herd.node("db_7"));
    let operation = objects::Operation::Put { name: "packs/one".to_owned() };
    let (ask, object) = (objects::Ask { repository: "/".to_owned(), operation }, vec![7; 70 << 20]);
    let (told, back) = node.objects(&ask, &object).await.unwrap();
    assert_eq!((told, back.len()), (objects::Told::Bytes, object.len()));
}

#[tokio::test]
async fn the_caller_is_the_one_in_the_certificate() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let node = server.client(&herd.node("db_7"));
    assert_eq!(node.raft("append", "[1,2]".into()).await.unwrap(), "[1,2]");
    assert_eq!(server.backend.last_call().unwrap(), "db_7: raft append, 5 bytes");
    let proxy = server.client(&herd.proxy("db_7"));
    let request =
        pgherd_api::join::ProxyRenewRequest { csr: String::new(), hosts: Vec::new(), valid_for_s: 1 };
    proxy.proxy_renew(&request).await.unwrap();
    assert_eq!(server.backend.last_call().unwrap(), "db_7: proxy renew");
    proxy.drained(&pgherd_api::routing::Drained { drain: 7, process: None }).await.unwrap();
    assert_eq!(server.backend.last_call().unwrap(), "db_7: drained 7");
    let operator = server.client(&herd.operator("anna.schmidt"));
    let request = pgherd_api::spec::ApplyRequest {
        text: String::new(),
        file: None,
        generation: 6,
        accept: pgherd_api::spec::Impact::None,
    };
    let refused = operator.apply(&request).await.unwrap_err();
    assert_eq!(server.backend.last_call().unwrap(), "anna.schmidt: apply");
    assert_eq!(refused.exit_class(), pgherd_api::ExitClass::Refused);
    assert!(refused.was_not_done());
    let shown = refused.to_error();
    assert_eq!(shown.message, "the plan is for generation 6");
    assert!(shown.hint.unwrap().contains("pgherd plan"));
}

#[tokio::test]
async fn the_socket_serves_its_owner_as_an_operator_and_no_web_page() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let listener = bind_socket(&path).unwrap();
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let backend = Arc::new(Fake::default());
    let (sender, stop) = Stop::new();
    let task = tokio::spawn(serve_socket(listener, Api::new(Arc::clone(&backend)), stop));

    let client = Client::unix(&path);
    for route in route::ALL {
        assert_eq!(outcome(&client, route).await, expected(route.access, "operator"), "{}", route.path);
    }
    let request = pgherd_api::change::SwitchoverCancelRequest { cluster: None };
    client.switchover_cancel(&request).await.unwrap();
    assert_eq!(backend.last_call().unwrap(), "local: switchover cancel");

    for (header, status) in [
        ("Origin: http://evil.example", "403"),
        ("Sec-Fetch-Site: cross-site", "403"),
        ("Origin: null", "403"),
        ("X-Nothing: x", "200"),
    ] {
        let head =
            format!("GET /v1/status HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n");
        let answer =
            crate::limits::exchange(tokio::net::UnixStream::connect(&path).await.unwrap(), &head).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{header}: {answer}");
    }
    // What a form can send without asking first.
    let form = "POST /v1/switchover/cancel HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n\
                Content-Length: 2\r\nConnection: close\r\n\r\n{}";
    let answer = crate::limits::exchange(tokio::net::UnixStream::connect(&path).await.unwrap(), form).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");

    assert!(bind_socket(&path).is_err(), "an agent that answers is not pushed aside");
    sender.send(true).unwrap();
    task.await.unwrap();
    bind_socket(&path).expect("what a dead agent left is replaced");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a file of somebody's").unwrap();
    assert!(bind_socket(&path).is_err(), "nothing but a socket is replaced");
}

#[tokio::test]
async fn the_agent_must_be_the_one_that_was_dialled() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let own = herd.node("b");
    assert!(server.client_for("a", &own).status().await.is_ok());
    let dialled_another = server.client_for("c", &own).status().await.unwrap_err();
    let CallError::NotTrusted { cause, .. } = &dialled_another else { panic!("{dialled_another:?}") };
    assert!(cause.contains("node a") && cause.contains('c'), "{cause}");
    assert!(dialled_another.was_not_done());

    // An operator who has nothing but addresses takes any node of the herd, and nobody else.
    let operator = Arc::new(herd.operator("anna").client_tls().unwrap());
    assert!(Client::tls(server.address.to_string(), None, operator).status().await.is_ok());
    let other_herd = Arc::new(Herd::new().operator("anna").client_tls().unwrap());
    let refused = Client::tls(server.address.to_string(), None, other_herd).status().await.unwrap_err();
    assert!(matches!(refused, CallError::NotTrusted { .. }), "{refused:?}");

    let wrong_pin = Arc::new(ClientTls::pinned(CaPin([0; 32])));
    let refused = Client::tls(server.address.to_string(), None, wrong_pin).status().await.unwrap_err();
    assert!(matches!(refused, CallError::NotTrusted { .. }), "{refused:?}");
}

/// The host name of one node must not let it pass for the node of that name.
#[tokio::test]
async fn a_dns_name_is_not_an_identity() {
    let herd = Herd::new();
    let key = pgherd_agent::pki::NewKey::generate().unwrap();
    let subject = pgherd_agent::pki::NodeSubject {
        name: &"mallory".parse().unwrap(),
        // Before a node `a` existed, this was a host name like any other.
        hosts: &["a".to_owned()],
        others: &[],
    };
    let pem = herd.authority.issue_node(&key.request().unwrap(), &subject, Timestamp::now(), YEAR).unwrap();
    let mallory = Credentials::from_pem(herd.authority.certificate_pem(), &pem, &key.expose_pem()).unwrap();
    let server = Server::start_as(&mallory).await;
    let refused = server.client_for("a", &herd.node("b")).status().await.unwrap_err();
    assert!(matches!(refused, CallError::NotTrusted { .. }), "{refused:?}");
}

/// An operator's certificate cannot stand behind a listener, and a proxy's, which can, is no agent's.
#[tokio::test]
async fn an_operator_is_no_server_and_a_proxy_no_agent() {
    let herd = Herd::new();
    for credentials in [herd.operator("anna"), herd.proxy("a")] {
        let server = Server::start_as(&credentials).await;
        for dialled in [None, Some("a")] {
            let tls = Arc::new(herd.node("b").client_tls().unwrap());
            let refused = Client::tls(server.address.to_string(), dialled, tls).status().await.unwrap_err();
            assert!(matches!(refused, CallError::NotTrusted { .. }), "{credentials:?}: {refused:?}");
        }
    }
}

/// A node in the certificate's place of many names is nobody.
#[tokio::test]
async fn replaced_certificates_serve_new_connections() {
    let herd = Herd::new();
    let server = Server::start(&herd).await;
    let own = herd.node("b");
    let tls = Arc::new(own.client_tls().unwrap());
    let client = Client::tls(server.address.to_string(), Some("a"), Arc::clone(&tls));
    client.status().await.unwrap();

    // From now on the server is `z`; the open connection goes on.
    server.tls.replace(&herd.node("z")).unwrap();
    client.status().await.expect("an open connection keeps what it began with");
    assert!(server.client_for("z", &own).status().await.is_ok());

    // From now on the client is `c`; its open connection as `b` is not used again.
    server.tls.replace(&herd.node("a")).unwrap();
    herd.node("c").replace_in(&tls).unwrap();
    client.peer_report("{}".into()).await.unwrap();
    assert_eq!(server.backend.last_call().unwrap(), "c: report");
}
