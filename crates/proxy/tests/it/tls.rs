//! TLS on both sides, as libpq and PostgreSQL themselves see it, and certificates that are replaced.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use pgherd_core::spec::TlsMode;
use pgherd_pgwire::message::build;
use pgherd_pgwire::startup::Version;
use pgherd_proxy::ClientTls;
use pgherd_proxy::hba::Hba;
use pgherd_proxy::ident::Maps;
use pgherd_proxy::routes::{Standby, Table, Target};
use pgherd_proxy::tls::{Trust, to_servers};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Scene, connect, settings, story, until};
use crate::programs::{psql, run};
use crate::server::Server;

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
}

struct Made {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let made = params.self_signed(&key).unwrap();
        let (pem, certificate) = (made.pem(), made.der().clone());
        Authority { issuer: Issuer::new(params, key), certificate, pem }
    }

    /// With that common name, for that host.
    fn issue(&self, name: &str) -> Made {
        self.issue_to(&[(DnType::CommonName, name)], vec![name.to_owned()])
    }

    /// With that subject.
    fn issue_to(&self, subject: &[(DnType, &str)], hosts: Vec<String>) -> Made {
        let mut params = CertificateParams::new(hosts).unwrap();
        // The one by default has a name already, in front.
        params.distinguished_name = DistinguishedName::new();
        for (part, value) in subject {
            params.distinguished_name.push(part.clone(), *value);
        }
        let key = KeyPair::generate().unwrap();
        let made = params.signed_by(&key, &self.issuer).unwrap();
        Made { chain: vec![made.der().clone()], pem: made.pem(), key }
    }
}

impl Made {
    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.serialize_der()).unwrap()
    }

    fn save(&self, dir: &Path, name: &str) {
        std::fs::write(dir.join(format!("{name}.pem")), &self.pem).unwrap();
        let key = dir.join(format!("{name}.key"));
        std::fs::write(&key, self.key.serialize_pem()).unwrap();
        std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
}

/// The server has this certificate, and TLS, from now on, or has none.
async fn serve_tls(port: u16, dir: &Path, certificate: Option<&Made>) {
    let admin =
        connect(&format!("host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable")).await;
    let admin = admin.unwrap();
    if let Some(certificate) = certificate {
        certificate.save(dir, "server");
        for (setting, file) in
            [("ssl_cert_file", "server.pem"), ("ssl_key_file", "server.key"), ("ssl_ca_file", "ca.pem")]
        {
            let set = format!("ALTER SYSTEM SET {setting} = '{}'", dir.join(file).display());
            admin.batch_execute(&set).await.unwrap();
        }
    }
    let on = if certificate.is_some() { "on" } else { "off" };
    admin.batch_execute(&format!("ALTER SYSTEM SET ssl = {on}")).await.unwrap();
    reload(port).await;
}

/// Returns when new connections are judged by the files as they are now.
async fn reload(port: u16) {
    let to = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable");
    let admin = connect(&to).await.unwrap();
    let before = crate::harness::one(&admin, "SELECT pg_conf_load_time()").await;
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    until("the postmaster has read its files", async || {
        let fresh = connect(&to).await.unwrap();
        crate::harness::one(&fresh, "SELECT pg_conf_load_time()").await != before
    })
    .await;
}

/// What came of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    Tls,
    Clear,
    Not,
}
use Came::{Clear, Not, Tls};

const ADMIT_ADMINS: &str = "hostnossl all,replication postgres,pgherd_proxy 127.0.0.1/32 trust\n\
     hostssl all postgres,pgherd_proxy 127.0.0.1/32 trust\n";

/// Who answers a client of the reading port, and how it was reached.
async fn through(scene: &Scene, standby: u16) -> Came {
    let ask = "SELECT current_setting('port') || ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    match psql(&format!("{} sslmode=disable", scene.reading()), ask).await {
        Ok(said) if said == format!("{standby}true") => Tls,
        Ok(said) if said == format!("{standby}false") => Clear,
        // The primary has stepped in, or the standby has refused.
        Ok(_) | Err(_) => Not,
    }
}

/// The same by libpq.
async fn directly(mode: TlsMode, port: u16, ca: &Path) -> Came {
    // With a file of authorities `require` would be `verify-ca`, for old times' sake.
    let root = if mode >= TlsMode::VerifyCa { ca.display().to_string() } else { "/nonexistent".to_owned() };
    let to = format!(
        "host=s hostaddr=127.0.0.1 port={port} user=alice dbname=shop sslmode={mode} sslrootcert={root} sslcert=/nonexistent"
    );
    match psql(&to, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").await.as_deref() {
        Ok("t") => Tls,
        Ok("f") => Clear,
        _ => Not,
    }
}

story! {
    async fn servers_are_reached_in_each_mode_as_libpq_reaches_them(scene) {
        let dir = tempfile::tempdir().unwrap();
        let (herds, strangers) = (Authority::new("herd"), Authority::new("stranger"));
        let dir_of = |name: &str| {
            let dir = dir.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("ca.pem"), &herds.pem).unwrap();
            dir
        };
        let standby = Server::standby_of(&scene.server);
        let (of_primary, of_standby) = (dir_of("primary"), dir_of("standby"));
        serve_tls(scene.server.port, &of_primary, Some(&herds.issue("a"))).await;
        let shown = herds.issue("pgherd:proxy/up");
        *scene.trusts.0.lock().unwrap() =
            Some((vec![herds.certificate.clone()], (shown.chain.clone(), Arc::new(shown.key()))));
        let target = Target {
            node: "s".parse().unwrap(),
            address: Ipv4Addr::LOCALHOST.into(),
            port: standby.port,
            socket_dir: None,
        };
        let table = Table { standbys: vec![Standby { target, weight: 1 }], ..scene.table(1, Some("a")) };
        assert!(scene.proxy.learn(table));

        let right = || Some(herds.issue("s"));
        let either = "host all all 127.0.0.1/32 scram-sha-256\n";
        for (setting, certificate, admitted, expected) in [
            ("no TLS", None, either, [Clear, Clear, Clear, Not, Not, Not]),
            ("its own certificate", right(), either, [Clear, Clear, Tls, Tls, Tls, Tls]),
            ("another node's certificate", Some(herds.issue("b")), either, [Clear, Clear, Tls, Tls, Tls, Not]),
            ("a stranger's certificate", Some(strangers.issue("s")), either, [Clear, Clear, Tls, Tls, Not, Not]),
            ("only TLS", right(), "hostssl all all 127.0.0.1/32 scram-sha-256\n", [Not, Tls, Tls, Tls, Tls, Tls]),
            ("TLS for others", right(), "hostnossl all all 127.0.0.1/32 scram-sha-256\n", [
                Clear, Clear, Clear, Not, Not, Not,
            ]),
        ] {
            standby.admit(&format!("{ADMIT_ADMINS}{admitted}"));
            serve_tls(standby.port, &of_standby, certificate.as_ref()).await;
            for (mode, expected) in TlsMode::ALL.into_iter().zip(expected) {
                let ca = of_standby.join("ca.pem");
                assert_eq!(directly(mode, standby.port, &ca).await, expected, "libpq: {setting}, {mode}");
                let mut changed = settings();
                changed.server_mode = mode;
                // The proxy's own questions are always verified in full, and some of these servers are not.
                changed.reads.your_writes = false;
                scene.proxy.replace(changed);
                scene.proxy.reconnect();
                assert_eq!(through(scene, standby.port).await, expected, "{setting}, {mode}");
            }
        }
    }
}

/// A client of the proxy, and whether it has TLS.
async fn client(conninfo: &str) -> Came {
    match run("psql", &["-XAt", "-d", conninfo, "-c", "\\conninfo", "-c", "SELECT 1"]).await {
        output if !output.status.success() => Not,
        output => match String::from_utf8(output.stdout).unwrap().contains("SSL connection") {
            true => Tls,
            false => Clear,
        },
    }
}

story! {
    async fn clients_come_in_each_mode_as_the_proxys_mode_allows(scene) {
        let dir = tempfile::tempdir().unwrap();
        let (herds, people, strangers) = (Authority::new("herd"), Authority::new("people"), Authority::new("stranger"));
        std::fs::write(dir.path().join("ca.pem"), &herds.pem).unwrap();
        let shown = herds.issue("127.0.0.1");
        people.issue("alice").save(dir.path(), "alice");
        people.issue("bob").save(dir.path(), "bob");
        strangers.issue("alice").save(dir.path(), "strange");
        let set = |mode: TlsMode, hba: &str| {
            let mut changed = settings();
            changed.client_mode = mode;
            let authorities = std::slice::from_ref(&people.certificate);
            changed.client_tls = Some(ClientTls::new(shown.chain.clone(), shown.key(), Some(authorities)).unwrap());
            changed.hba = Hba::parse(hba.lines()).unwrap();
            scene.proxy.replace(changed);
        };
        let conninfo = |mode: TlsMode, certificate: &str| {
            let at = |name: String| dir.path().join(name).display().to_string();
            let (root, cert, key) =
                (at("ca.pem".to_owned()), at(format!("{certificate}.pem")), at(format!("{certificate}.key")));
            scene.conninfo("alice", &format!("sslmode={mode} sslrootcert={root} sslcert={cert} sslkey={key}"))
        };
        let (any, tls_only, clear_only) = (
            "host all all 127.0.0.1/32 scram-sha-256",
            "hostssl all all 127.0.0.1/32 scram-sha-256",
            "hostnossl all all 127.0.0.1/32 scram-sha-256",
        );
        let in_clear = [Clear, Clear, Clear, Not, Not, Not];
        let as_wanted = [Clear, Clear, Tls, Tls, Tls, Tls];
        let encrypted = [Not, Tls, Tls, Tls, Tls, Tls];
        // Who shows nothing, somebody else's certificate, and their own.
        for (mode, hba, none, others, own) in [
            (TlsMode::Disable, any, in_clear, in_clear, in_clear),
            (TlsMode::Allow, any, as_wanted, as_wanted, as_wanted),
            (TlsMode::Prefer, any, as_wanted, as_wanted, as_wanted),
            (TlsMode::Prefer, tls_only, encrypted, encrypted, encrypted),
            (TlsMode::Prefer, clear_only, in_clear, in_clear, in_clear),
            (TlsMode::Require, any, encrypted, encrypted, encrypted),
            (TlsMode::VerifyCa, any, [Not; 6], encrypted, encrypted),
            (TlsMode::VerifyFull, any, [Not; 6], [Not; 6], encrypted),
        ] {
            set(mode, hba);
            for (certificate, expected) in [("none", none), ("bob", others), ("alice", own)] {
                for (clients, expected) in TlsMode::ALL.into_iter().zip(expected) {
                    let came = client(&conninfo(clients, certificate)).await;
                    assert_eq!(came, expected, "{mode}, {hba}: {certificate} with sslmode={clients}");
                }
            }
        }
        set(TlsMode::Prefer, any);
        let strange = conninfo(TlsMode::Require, "strange");
        assert_eq!(client(&strange).await, Not, "who shows a wrong one is refused also where none is needed");
        set(TlsMode::VerifyCa, any);
        let told = psql(&conninfo(TlsMode::Require, "none"), "SELECT 1").await.unwrap_err();
        assert!(told.contains("connection requires a valid client certificate"), "{told}");
        set(TlsMode::Prefer, "hostssl all all all scram-sha-256 clientcert=verify-full");
        let told = psql(&conninfo(TlsMode::Require, "bob"), "SELECT 1").await.unwrap_err();
        assert!(told.contains("certificate authentication failed for user \"alice\""), "{told}");
        assert_eq!(client(&conninfo(TlsMode::Require, "alice")).await, Tls);
    }
}

story! {
    async fn a_certificate_is_enough_where_postgresql_lets_the_proxy_in_for_its_role(scene) {
        let dir = tempfile::tempdir().unwrap();
        let (herds, people) = (Authority::new("herd"), Authority::new("people"));
        std::fs::write(dir.path().join("ca.pem"), &herds.pem).unwrap();
        people.issue("carol").save(dir.path(), "carol");
        people.issue("bob").save(dir.path(), "bob");
        serve_tls(scene.server.port, dir.path(), Some(&herds.issue("a"))).await;
        // As an agent writes it.
        scene.server.admit(&format!(
            "{ADMIT_ADMINS}hostssl all \"carol\" all cert map=pgherd_proxied\n\
             host all all 127.0.0.1/32 scram-sha-256\n"
        ));
        scene.server.map("pgherd_proxied \"/^pgherd:proxy/[a-z][a-z0-9_]{0,47}$\" \"carol\"\n");
        reload(scene.server.port).await;
        let own = herds.issue("pgherd:proxy/up");
        *scene.trusts.0.lock().unwrap() =
            Some((vec![herds.certificate.clone()], (own.chain.clone(), Arc::new(own.key()))));
        let set = |users: &[&str], hba: &str| {
            let shown = herds.issue("127.0.0.1");
            let authorities = std::slice::from_ref(&people.certificate);
            let mut changed = settings();
            changed.client_tls = Some(ClientTls::new(shown.chain.clone(), shown.key(), Some(authorities)).unwrap());
            changed.hba = Hba::parse(hba.lines()).unwrap();
            changed.certificate_users = users.iter().map(|user| (*user).to_owned()).collect();
            scene.proxy.replace(changed);
        };
        let as_user = |user: &str, certificate: &str| {
            let at = |end: &str| dir.path().join(format!("{certificate}.{end}")).display().to_string();
            let files = format!("sslmode=require sslcert={} sslkey={}", at("pem"), at("key"));
            // No password is known.
            scene.conninfo(user, &files).replace("password=", "application_name=")
        };
        let who = "SELECT session_user || ' ' || ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let by_certificate = "hostssl all all all cert";
        set(&["carol"], by_certificate);
        for _ in 0..3 {
            assert_eq!(psql(&as_user("carol", "carol"), who).await, Ok("carol true".to_owned()));
        }
        for (user, certificate, told) in [
            ("carol", "bob", "certificate authentication failed for user \"carol\""),
            ("carol", "none", "connection requires a valid client certificate"),
            ("bob", "bob", "certificate_users of [proxy] does not list role \"bob\""),
            ("pgherd_proxy", "carol", "role \"pgherd_proxy\" does not come in through a proxy"),
        ] {
            let refused = psql(&as_user(user, certificate), who).await.unwrap_err();
            assert!(refused.contains(told), "{user} with {certificate}: {refused}");
        }
        // Nobody but a proxy has such a certificate.
        let directly = as_user("carol", "carol").replace(
            &format!("port={}", scene.proxy.addresses()[0].port()),
            &format!("port={}", scene.server.port),
        );
        assert!(psql(&directly, who).await.is_err());

        // A password, too, may let the role in here; PostgreSQL asks for none.
        set(&["carol"], "host all all all scram-sha-256");
        assert_eq!(psql(&scene.conninfo("carol", "sslmode=disable"), who).await, Ok("carol true".to_owned()));
        // A server that asks for nothing is not believed otherwise.
        set(&[], "host all all all scram-sha-256");
        scene.proxy.reconnect();
        let refused = psql(&scene.conninfo("carol", "sslmode=disable"), who).await.unwrap_err();
        assert!(refused.contains("no proof at all"), "{refused}");
    }
}

/// What the proxy shows at the moment to whoever asks for TLS, in either way.
async fn shown(port: u16, direct: bool) -> CertificateDer<'static> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let mut config = (*to_servers(Trust::Anything, None).unwrap()).clone();
    if direct {
        config.alpn_protocols = vec![pgherd_proxy::ALPN.to_vec()];
    } else {
        let mut asked = bytes::BytesMut::new();
        build::ssl_request(&mut asked);
        stream.write_all(&asked).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'S');
    }
    let name = ServerName::try_from("db").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

story! {
    async fn whoever_begins_with_tls_must_say_what_is_to_be_spoken(scene) {
        let dir = tempfile::tempdir().unwrap();
        crate::programs::with_tls(scene, dir.path(), false);
        for (spoken, is_right) in [(&[][..], false), (&[&b"h2"[..]], false), (&[&b"h2"[..], b"postgresql"], true)] {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, scene.proxy.addresses()[0].port())).await.unwrap();
            let mut config = (*to_servers(Trust::Anything, None).unwrap()).clone();
            config.alpn_protocols = spoken.iter().map(|protocol| protocol.to_vec()).collect();
            let name = ServerName::try_from("db").unwrap();
            let asked = async {
                let connected = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await;
                let mut stream = connected.ok()?;
                let mut startup = bytes::BytesMut::new();
                let parameters = [(&b"user"[..], &b"alice"[..]), (b"database", b"shop")];
                build::startup_message(&mut startup, Version::V3_0, &parameters).unwrap();
                stream.write_all(&startup).await.ok()?;
                stream.read_u8().await.ok()
            };
            let answer = tokio::time::timeout(crate::harness::SOON, asked).await.expect("in time");
            assert_eq!(answer, is_right.then_some(b'R'), "{spoken:?}");
        }
    }
}

story! {
    async fn certificates_are_replaced_under_those_who_are_at_work(scene) {
        let dir = tempfile::tempdir().unwrap();
        let port = scene.proxy.addresses()[0].port();
        let (mut herds, people) = (Authority::new("herd"), Authority::new("people"));
        let roots = dir.path().join("roots.pem");
        let replace = |herds: &Authority, all: &mut String| {
            all.push_str(&herds.pem);
            // Whole: clients read it meanwhile.
            let next = roots.with_extension("next");
            std::fs::write(&next, &all).unwrap();
            std::fs::rename(next, &roots).unwrap();
            let made = herds.issue("127.0.0.1");
            let mut changed = settings();
            changed.client_mode = TlsMode::Require;
            let authorities = std::slice::from_ref(&people.certificate);
            changed.client_tls = Some(ClientTls::new(made.chain.clone(), made.key(), Some(authorities)).unwrap());
            scene.proxy.replace(changed);
            made.chain[0].clone()
        };
        let mut all = String::new();
        replace(&herds, &mut all);
        std::fs::write(dir.path().join("ca.pem"), &herds.pem).unwrap();
        serve_tls(scene.server.port, dir.path(), Some(&herds.issue("a"))).await;
        let own = herds.issue("pgherd:proxy/up");
        *scene.trusts.0.lock().unwrap() =
            Some((vec![herds.certificate.clone()], (own.chain.clone(), Arc::new(own.key()))));

        let script = dir.path().join("script.sql");
        std::fs::write(&script, "BEGIN;\nSELECT 1;\nSELECT pg_sleep(0.002);\nCOMMIT;\n").unwrap();
        let to = format!("{} sslmode=verify-full sslrootcert={}", scene.conninfo("alice", ""), roots.display())
            .replace("dbname=shop", "dbname=mall");
        let bench = |more: &'static [&'static str]| {
            let (script, to) = (script.display().to_string(), to.clone());
            tokio::spawn(async move {
                let first = ["-n", "-T", "6", "-f", &script];
                run("pgbench", &[&first[..], more, &[&to]].concat()).await
            })
        };
        // Those who stay, and those who come anew for each transaction; each of these in a thread of its own, since it waits
        // while it connects, and others would keep their servers meanwhile.
        let (staying, coming) = (bench(&["-c", "20", "-j", "2"]), bench(&["-c", "2", "-j", "2", "-C"]));
        let opened = async || {
            let admin = scene.admin().await;
            crate::harness::one(&admin, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'alice'").await
        };
        until("there is work", async || opened().await == "3").await;
        let mut rounds = 0;
        while !staying.is_finished() {
            // Everything is another one: who signs, what servers have, what the proxy shows to them and to clients.
            herds = Authority::new(&format!("herd {rounds}"));
            let certificate = replace(&herds, &mut all);
            for direct in [false, true] {
                assert_eq!(shown(port, direct).await, certificate, "who comes now sees the new one");
            }
            std::fs::write(dir.path().join("ca.pem"), &all).unwrap();
            serve_tls(scene.server.port, dir.path(), Some(&herds.issue("a"))).await;
            let own = herds.issue("pgherd:proxy/up");
            *scene.trusts.0.lock().unwrap() =
                Some((vec![herds.certificate.clone()], (own.chain.clone(), Arc::new(own.key()))));
            scene.proxy.reconnect();
            rounds += 1;
        }
        for (name, bench) in [("staying", staying), ("coming", coming)] {
            let output = bench.await.unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}, {rounds} rounds: {said}");
            assert!(said.contains("number of failed transactions: 0"), "{name}: {said}");
        }
        assert!(rounds >= 3, "{rounds} rounds in six seconds");
        // A server that somebody of the former herd would be is not believed any more.
        serve_tls(scene.server.port, dir.path(), Some(&people.issue("a"))).await;
        scene.proxy.reconnect();
        let mut changed = settings();
        changed.limits.hold = std::time::Duration::from_millis(300);
        changed.limits.query_wait = std::time::Duration::from_millis(300);
        scene.proxy.replace(changed);
        assert!(psql(&scene.conninfo("bob", "sslmode=disable"), "SELECT 1").await.is_err());
    }
}

story! {
    async fn what_lines_of_ident_mean_is_what_they_mean_to_postgresql(scene) {
        use DnType::{CommonName, OrganizationName, OrganizationalUnitName};
        let dir = tempfile::tempdir().unwrap();
        let (herds, people) = (Authority::new("herd"), Authority::new("people"));
        // PostgreSQL is to judge the same certificates.
        std::fs::write(dir.path().join("ca.pem"), [&herds.pem[..], &people.pem].concat()).unwrap();
        for (name, subject) in [
            ("comma", &[(OrganizationName, "Shop, Inc"), (OrganizationalUnitName, "Till"), (CommonName, "anna")][..]),
            ("unit", &[(OrganizationName, "x"), (OrganizationalUnitName, "dave"), (CommonName, "whoever")]),
            ("letters", &[(CommonName, "Dave Ä"), (OrganizationName, "Größe")]),
            ("mail", &[(CommonName, "dave@example.com")]),
        ] {
            people.issue_to(subject, Vec::new()).save(dir.path(), name);
        }
        serve_tls(scene.server.port, dir.path(), Some(&herds.issue("a"))).await;
        let own = herds.issue("pgherd:proxy/up");
        *scene.trusts.0.lock().unwrap() =
            Some((vec![herds.certificate.clone()], (own.chain.clone(), Arc::new(own.key()))));
        let admin = scene.admin().await;
        for (options, ident, certificate, user, expected) in [
            ("clientname=DN", "people \"CN=anna,OU=Till,O=Shop\\, Inc\" dave", "comma", "dave", true),
            ("clientname=DN", "people \"CN=anna,OU=Till,O=Shop, Inc\" dave", "comma", "dave", false),
            ("clientname=DN", "people \"/^.*,OU=Till,.*$\" dave", "comma", "dave", true),
            ("clientname=DN", "people \"/^.*,OU=Till,.*$\" dave", "unit", "dave", false),
            ("clientname=DN", "people \"/^CN=whoever,OU=(.*),O=x$\" \\1", "unit", "dave", true),
            ("clientname=DN", "people \"/^CN=whoever,OU=(.*),O=x$\" \\1", "unit", "carol", false),
            ("clientname=DN", "people \"/OU=([[:lower:]]+),\" \\1", "unit", "dave", true),
            ("clientname=DN", "people \"O=Gr\\C3\\B6\\C3\\9Fe,CN=Dave \\C3\\84\" dave", "letters", "dave", true),
            ("clientname=CN", "people \"Dave Ä\" dave", "letters", "dave", true),
            ("clientname=CN", "people \"/^Dave ..$\" dave", "letters", "dave", true),
            ("clientname=CN", "people \"/^Dave .$\" dave", "letters", "dave", false),
            ("", "people dave@example.com dave", "mail", "dave", true),
            ("", "people DAVE@example.com dave", "mail", "dave", false),
            ("", "people /^(.*)@example\\.com$ \\1", "mail", "dave", true),
            ("", "people /^(.*)@example\\.com$ \\1", "mail", "carol", false),
            ("", "others dave@example.com dave", "mail", "dave", false),
        ] {
            let case = format!("{options} {ident}: {certificate} as {user}");
            // The same role is known here by the proxy, and there by the certificate.
            scene.server.admit(&format!(
                "{ADMIT_ADMINS}hostssl shop dave,carol all cert map=pgherd_proxied\n\
                 hostssl mall dave,carol all cert map=people {options}\n"
            ));
            let proxies = "\"/^pgherd:proxy/[a-z][a-z0-9_]{0,47}$\"";
            scene.server.map(&format!("pgherd_proxied {proxies} dave\npgherd_proxied {proxies} carol\n{ident}\n"));
            reload(scene.server.port).await;
            let wrong = "SELECT count(*) FROM pg_ident_file_mappings WHERE error IS NOT NULL";
            assert_eq!(crate::harness::one(&admin, wrong).await, "0", "{case}");

            let shown = herds.issue("127.0.0.1");
            let mut changed = settings();
            let authorities = std::slice::from_ref(&people.certificate);
            changed.client_tls = Some(ClientTls::new(shown.chain.clone(), shown.key(), Some(authorities)).unwrap());
            let hba = Hba::parse([format!("hostssl all all all cert map=people {options}").as_str()]).unwrap();
            changed.hba = hba.mapped_by(Maps::parse([ident]).unwrap());
            changed.certificate_users = ["dave", "carol"].map(str::to_owned).into();
            scene.proxy.replace(changed);
            let at = |end: &str| dir.path().join(format!("{certificate}.{end}")).display().to_string();
            let files = format!("sslmode=require sslcert={} sslkey={} application_name=", at("pem"), at("key"));
            let port = scene.server.port;
            let there = psql(&format!("host=127.0.0.1 port={port} user={user} dbname=mall {files}"), "SELECT 1").await;
            let here = psql(&scene.conninfo(user, &files), "SELECT 1").await;
            assert_eq!(there.is_ok(), expected, "PostgreSQL: {case}: {there:?}");
            assert_eq!(here.is_ok(), expected, "the proxy: {case}: {here:?}");
            let failed = format!("certificate authentication failed for user \"{user}\"");
            for refused in [there, here].into_iter().filter_map(Result::err) {
                assert!(refused.contains(&failed), "{case}: {refused}");
            }
        }
        // PostgreSQL takes no map beside a password, and so the proxy takes none either.
        scene.server.admit(&format!("{ADMIT_ADMINS}hostssl all all all scram-sha-256 clientcert=verify-full map=people\n"));
        let error = "SELECT error FROM pg_hba_file_rules WHERE error IS NOT NULL";
        assert!(crate::harness::one(&admin, error).await.contains("map"));
    }
}
