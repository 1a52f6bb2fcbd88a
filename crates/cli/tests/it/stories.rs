//! Herds on this machine, from the first `up` to the last `down`. Those that need root say so in their names.

use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::herd::{Herd, is_root, kill, owner, wait_for};

/// The promise of the README: healthy in under a minute.
const HEALTHY_WITHIN: Duration = Duration::from_secs(60);

#[test]
fn as_root_a_herd_survives_its_primary_and_loses_nothing() {
    assert!(is_root(), "this test needs root");
    let herd = Herd::new();
    let begun = Instant::now();
    let said = herd.up();
    assert!(begun.elapsed() < HEALTHY_WITHIN, "{:?}", begun.elapsed());
    assert!(said.contains("pgherd psql") && said.contains("passfile="), "how to connect: {said}");
    // It waits so long, and no longer, for the first base backup.
    let can_be_restored = said.contains("can be restored, newest base backup");
    assert!(can_be_restored || begun.elapsed() >= Duration::from_secs(5), "{said}");
    let status = herd.wait_whole();
    assert_eq!(status["herd"], "local");
    assert_eq!(status["clusters"][0]["primary"], "a");
    assert_eq!(
        status["clusters"][0]["durability"],
        json!(
            {"mode": "quorum", "needed": 1, "voters": ["b", "c"], "degraded": false}
        )
    );

    // One address for all of them.
    let listeners = status["proxy"].as_array().unwrap();
    let targets: Vec<&str> = listeners.iter().map(|proxy| proxy["target"].as_str().unwrap()).collect();
    assert_eq!(targets, ["read-write", "read-only"], "{listeners:?}");
    let (_, port) = listeners[0]["listen"].as_str().unwrap().rsplit_once(':').unwrap();
    assert!(said.contains(&format!("port={port} ")), "{port} in {said}");
    assert!(herd.run(&["psql", "--print"]).contains(&format!("port={port} ")), "psql goes through it");

    // PostgreSQL and agents are not root's, and passwords are nobody else's.
    assert_ne!(owner(&herd.dir.join("a/data")), 0);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(herd.dir.join("pgpass")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    let password = std::fs::read_to_string(herd.dir.join("pgpass")).unwrap();
    let password = password.trim().rsplit(':').next().unwrap();
    for process in herd.processes() {
        let arguments = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&arguments).contains(password), "{process:?}");
    }

    herd.sql("create table kept (n int primary key)").unwrap();
    herd.sql("insert into kept values (1)").unwrap();
    kill(herd.postmaster("a").unwrap(), Signal::KILL).unwrap();
    // Whoever comes now waits until there is another primary, and hears nothing of it.
    herd.sql("insert into kept values (2)").unwrap();
    let successor = wait_for("another primary", || match herd.primary()? {
        primary if primary == "a" => Err("still a".to_owned()),
        primary => Ok(primary),
    });
    assert_eq!(herd.sql("select string_agg(n::text, ',' order by n) from kept").unwrap(), "1,2");
    herd.wait_whole();

    let history = herd.run(&["history"]);
    assert!(history.contains(&format!("{successor} is primary on timeline")), "{history}");
    let explained = herd.run(&["explain"]);
    assert!(explained.contains(&format!("streams from {successor}")), "{explained}");
    wait_for("all checks to pass", || {
        let check = herd.output(&["check"]);
        if check.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&check.stdout).into_owned()) }
    });

    // Refused as long as a is about to count again and does not yet.
    wait_for("the switchover", || {
        let output = herd.output(&["switchover", "--to", "a", "--yes"]);
        match output.status.code() {
            Some(0) => Ok(()),
            Some(3) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            other => panic!("{other:?}: {}", String::from_utf8_lossy(&output.stderr)),
        }
    });
    wait_for("a to be primary again", || match herd.primary()? {
        primary if primary == "a" => Ok(()),
        other => Err(other),
    });
    wait_for("writes after the switchover", || {
        herd.sql("insert into kept values (3) on conflict do nothing")
    });
    herd.wait_whole();

    herd.run(&["down"]);
    herd.wait_gone();
    herd.up();
    assert_eq!(herd.sql("select count(*) from kept").unwrap(), "3");
    herd.run(&["down"]);
    herd.wait_gone();
}

#[test]
fn as_root_nothing_depends_on_the_supervisor() {
    assert!(is_root(), "this test needs root");
    let herd = Herd::new();
    // Two at the same moment make one herd.
    let another =
        herd.command(&["up", "--detach"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    herd.up();
    let another = another.wait_with_output().unwrap();
    assert!(another.status.success(), "{}", String::from_utf8_lossy(&another.stderr));
    assert_eq!(herd.processes().iter().filter(|process| process.command == "up").count(), 1);
    herd.wait_whole();

    let supervisor = herd.supervisor().unwrap();
    let agents = || ["a", "b", "c"].map(|node| herd.agent(node).unwrap());
    let proxy = herd.proxy().unwrap();
    let (before, postmaster) = (agents(), herd.postmaster("a").unwrap());
    herd.lose_supervisor();
    herd.sql("create table kept (n int)").unwrap();
    herd.up();
    assert_ne!(herd.supervisor().unwrap(), supervisor);
    assert_eq!(agents(), before, "taken over, not started again");
    assert_eq!(herd.proxy().unwrap(), proxy, "and so was the proxy");

    // A dead proxy is started again, and nothing else notices.
    kill(proxy, Signal::KILL).unwrap();
    wait_for("another proxy", || match herd.proxy()? {
        pid if pid == proxy => Err("not gone yet".to_owned()),
        _ => herd.sql("select 1"),
    });
    assert_eq!(agents(), before);

    // A dead agent is started again, and takes over its PostgreSQL.
    let dead = herd.agent("a").unwrap();
    kill(dead, Signal::KILL).unwrap();
    wait_for("another agent of a", || match herd.agent("a")? {
        pid if pid == dead => Err("not gone yet".to_owned()),
        pid => Ok(pid),
    });
    herd.wait_whole();
    assert_eq!(herd.postmaster("a").unwrap(), postmaster, "PostgreSQL went on");
    // The agent that has just started knows what it sees before it may say who is primary.
    assert_eq!(wait_for("a primary", || herd.primary()), "a");

    // Without a supervisor, and with an agent gone beside it, `down` does the planned stop itself.
    // Whatever is on its way to become one still holds the lock.
    wait_for("every supervisor to be gone", || match herd.supervisor() {
        Err(_) => Ok(()),
        Ok(pid) => {
            kill(pid, Signal::KILL).ok();
            Err(pid.to_string())
        }
    });
    kill(herd.agent("c").unwrap(), Signal::KILL).unwrap();
    herd.run(&["down"]);
    herd.wait_gone();
    for node in ["a", "b", "c"] {
        let state = Command::new("/usr/lib/postgresql/15/bin/pg_controldata")
            .arg(herd.dir.join(node).join("data"))
            .output()
            .unwrap();
        let state = String::from_utf8(state.stdout).unwrap();
        let state = state.lines().find(|line| line.starts_with("Database cluster state")).unwrap();
        assert!(state.ends_with("shut down") || state.ends_with("shut down in recovery"), "{node}: {state}");
    }

    // What is not ours is not removed, and then neither is anything else.
    std::fs::write(herd.dir.join("diary.txt"), "dear diary").unwrap();
    let refused = herd.output(&["down", "--delete", "--yes"]);
    assert_eq!(refused.status.code(), Some(3), "{}", String::from_utf8_lossy(&refused.stderr));
    assert!(herd.dir.join("a/data/PG_VERSION").exists());
    std::fs::remove_file(herd.dir.join("diary.txt")).unwrap();
    let unasked = herd.output(&["down", "--delete"]);
    assert_eq!(unasked.status.code(), Some(2), "nobody can be asked here");
    herd.run(&["down", "--delete", "--yes"]);
    assert!(!herd.dir.exists());
}

#[test]
fn as_root_a_proxy_is_replaced_beneath_its_clients_and_its_supervisor_follows() {
    assert!(is_root(), "this test needs root");
    let herd = Herd::new();
    herd.up();
    herd.wait_whole();
    let first = herd.proxy().unwrap();
    let mut session = Session::of(herd.command(&["psql", "--", "--no-psqlrc"]));
    session.asks(1);

    kill(first, Signal::USR2).unwrap();
    let second = wait_for("a successor", || {
        herd.proxies().into_iter().find(|pid| *pid != first).ok_or_else(|| herd.logs())
    });
    let noted = || {
        let text =
            std::fs::read_to_string(herd.dir.join("run/-proxy.json")).map_err(|error| error.to_string())?;
        let noted: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        noted["pid"].as_i64().ok_or(text)
    };
    let is_noted = |pid: i32| {
        wait_for("the supervisor to follow it", || match noted()? {
            found if found == i64::from(pid) => Ok(()),
            other => Err(other.to_string()),
        });
    };
    is_noted(second);
    assert_eq!(herd.sql("select 2").unwrap(), "2");
    session.asks(3);

    // Of the listeners the first one has none any more, and has its client still.
    let log = herd.dir.join("proxy/log/proxy.log");
    wait_for("the end of the probation", || match std::fs::read_to_string(&log) {
        Ok(text) if text.contains("ends with its last client") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let address = || {
        herd.status()?["proxy"][0]["listen"].as_str().map(str::to_owned).ok_or_else(|| "no proxy".to_owned())
    };
    let before = address().unwrap();
    kill(second, Signal::KILL).unwrap();
    wait_for("its end", || match herd.proxies().contains(&second) {
        true => Err("it is there".to_owned()),
        false => Ok(()),
    });
    // Somebody else listens there meanwhile, if not this one: psql is not led there, though the first process has listened there.
    let holder = TcpListener::bind(&before);
    let third = wait_for("another one", || {
        herd.proxies().into_iter().find(|pid| ![first, second].contains(pid)).ok_or_else(|| herd.logs())
    });
    is_noted(third);
    wait_for("it to serve", || herd.sql("select 4"));
    session.asks(5);
    let after = wait_for("its address to be known", address);
    assert!(holder.is_err() || after != before, "{after}");

    // Two processes, of which the supervisor knows one as its own, and has started the other.
    assert_eq!(herd.proxies().len(), 2);
    herd.run(&["down"]);
    session.leave();
    herd.wait_gone();
}

#[test]
fn as_root_the_next_version_of_up_replaces_the_proxy_beneath_its_clients() {
    assert!(is_root(), "this test needs root");
    let herd = Herd::new();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let metrics = free.local_addr().unwrap();
    drop(free);
    let file = herd.dir.parent().unwrap().join("shop.toml");
    std::fs::write(&file, of_one_node(&format!("metrics_listen = \"{metrics}\""))).unwrap();
    let up = || herd.run(&["up", "--detach", "--herd", file.to_str().unwrap()]);
    up();
    let first = wait_for("the proxy", || herd.proxy());
    let program = |pid: i32| std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let numbers = || -> Result<String, String> {
        let mut stream = TcpStream::connect(metrics).map_err(|error| error.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(|error| error.to_string())?;
        if text.contains("pgherd_proxy_") { Ok(text) } else { Err(text) }
    };
    wait_for("numbers", numbers);
    let mut session = Session::of(herd.command(&["psql", "--", "--no-psqlrc"]));
    session.asks(1);

    // Its supervisor is of the former version, and gone.
    herd.lose_supervisor();
    herd.upgrade();
    up();
    let second = wait_for("a successor", || {
        herd.proxies().into_iter().find(|pid| *pid != first).ok_or_else(|| herd.logs())
    });
    wait_for("it to be the proxy that is kept", || {
        let log = std::fs::read_to_string(herd.dir.join("log/supervisor.log")).unwrap();
        if log.contains("another version, which is replaced") { Ok(()) } else { Err(log) }
    });
    assert_ne!(program(first), program(second));
    session.asks(2);
    assert_eq!(herd.sql("select 3").unwrap(), "3");
    wait_for("numbers", numbers);

    // With its last client the former one is gone, and everything is served by the other.
    session.leave();
    wait_for("the end of the first process", || match herd.proxies() {
        left if left == [second] => Ok(()),
        others => Err(format!("{others:?}")),
    });
    wait_for("numbers", numbers);
    assert_eq!(herd.sql("select 4").unwrap(), "4");
    herd.run(&["down"]);
    herd.wait_gone();
}

/// A herd file with one node, and these keys of its proxy.
fn of_one_node(proxy: &str) -> String {
    format!(
        "name = \"local\"\n[proxy]\n{proxy}\n[postgres]\nversion = 15\n\
         [[cluster]]\nname = \"main\"\ndurability = \"async\"\n[[cluster.node]]\nname = \"a\"\nhost = \"192.0.2.1\"\n\
         [[cluster.database]]\nname = \"app\"\nowner = \"app\"\n"
    )
}

/// A psql that stays connected.
struct Session {
    words: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    psql: Child,
}

impl Session {
    fn of(mut psql: Command) -> Session {
        let mut psql = psql.arg("-qAt").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (words, answers) = (psql.stdin.take().unwrap(), psql.stdout.take().unwrap());
        Session { words, answers: BufReader::new(answers).lines(), psql }
    }

    #[track_caller]
    fn asks(&mut self, number: u32) {
        writeln!(self.words, "begin; select {number}; commit;").unwrap();
        assert_eq!(self.answers.next().unwrap().unwrap(), number.to_string());
    }

    fn leave(mut self) {
        drop(self.words);
        assert!(self.psql.wait().unwrap().success());
    }
}

fn psql(conninfo: &str) -> Command {
    let mut psql = Command::new("psql");
    psql.args(["--no-psqlrc", conninfo]);
    psql
}

/// One proxy is told of it by a signal, that of `up` by its console.
#[test]
fn as_root_certificates_are_replaced_beneath_the_clients_of_proxies_that_run() {
    assert!(is_root(), "this test needs root");
    let herd = Herd::new();
    let at = |name: &str| herd.dir.parent().unwrap().join(name);
    // Whole: a proxy may look at any moment.
    let put = |text: &str, name: &str| {
        std::fs::write(at("next"), text).unwrap();
        std::fs::rename(at("next"), at(name)).unwrap();
    };
    // Each is signed by itself, so that who trusts one of them trusts no other.
    let [first, second, third] = ["first", "second", "third"].map(|name| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut wanted = rcgen::CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        wanted.distinguished_name.push(rcgen::DnType::CommonName, name);
        let made = wanted.self_signed(&key).unwrap();
        put(&made.pem(), name);
        (made.pem(), key.serialize_pem())
    });
    put(&[&first, &second, &third].map(|(certificate, _)| certificate.as_str()).concat(), "all");
    let show = |certificate: &str, key: &str| {
        put(certificate, "shown.pem");
        put(key, "shown.key");
    };
    show(&first.0, &first.1);
    let proxy = format!(
        "client_tls_mode = \"require\"\nclient_tls_cert_file = \"{}\"\nclient_tls_key_file = \"{}\"\n\
         console_admins = [\"app\"]",
        at("shown.pem").display(),
        at("shown.key").display()
    );
    std::fs::write(at("shop.toml"), of_one_node(&proxy)).unwrap();
    herd.run(&["up", "--detach", "--herd", at("shop.toml").to_str().unwrap()]);
    let (of_up, conninfo) = (herd.proxy().unwrap(), herd.run(&["psql", "--print"]));
    assert!(conninfo.contains("channel_binding=require"), "the herd does not know who made it: {conninfo}");
    assert_eq!(herd.sql("select 1").unwrap(), "1");

    let dir = at("front");
    let front = dir.to_str().unwrap();
    herd.run(&["proxy", "add", "front", "--host", "127.0.0.1", "--listen", "127.0.0.1", "--to", front]);
    let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [port, read_port] = free.map(|listener| listener.local_addr().unwrap().port());
    let file = std::fs::read_to_string(dir.join("proxy.toml")).unwrap();
    std::fs::write(dir.join("proxy.toml"), format!("port = {port}\nread_port = {read_port}\n{file}"))
        .unwrap();
    let log = std::fs::File::create(at("front.log")).unwrap();
    let mut front = herd.command(&["proxy", "--dir", front]).stderr(log).spawn().unwrap();
    let pid = i32::try_from(front.id()).unwrap();

    let alone = format!("port={port}");
    let reaching = |to: &str, trusted: &str| {
        format!("{} {to} sslmode=verify-full sslrootcert={}", conninfo.trim(), at(trusted).display())
    };
    let comes = |to: &str, trusted: &str| {
        let output = psql(&reaching(to, trusted)).args(["-qAtc", "select 1"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    };
    let is_shown = |to: &str, seen: &str, others: [&str; 2]| {
        comes(to, seen).unwrap();
        for other in others {
            let refused = comes(to, other).unwrap_err();
            assert!(refused.contains("certificate verify failed"), "{refused}");
        }
    };
    let reload = || {
        let output = psql(&reaching("dbname=pgbouncer", "all")).args(["-c", "RELOAD"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    };
    let logged = |what: &str| {
        wait_for(what, || match std::fs::read_to_string(at("front.log")).unwrap() {
            log if log.contains(what) => Ok(()),
            log => Err(log),
        });
    };
    wait_for("the proxy", || comes(&alone, "first"));
    let mut staying = ["", &alone].map(|to| Session::of(psql(&reaching(to, "first"))));
    staying.iter_mut().for_each(|session| session.asks(1));

    show(&second.0, &second.1);
    reload().unwrap();
    is_shown("", "second", ["first", "third"]);
    kill(pid, Signal::HUP).unwrap();
    logged("since it was sent SIGHUP");
    wait_for("the new one", || comes(&alone, "second"));
    is_shown(&alone, "second", ["first", "third"]);
    staying.iter_mut().for_each(|session| session.asks(2));

    // What does not fit together changes nothing, and is told of.
    show(&third.0, &second.1);
    let refused = reload().unwrap_err();
    assert!(refused.contains("what clients are shown cannot be used"), "{refused}");
    kill(pid, Signal::HUP).unwrap();
    logged("is not taken over");
    for to in ["", &alone] {
        is_shown(to, "second", ["first", "third"]);
    }
    show(&third.0, &third.1);
    reload().unwrap();
    is_shown("", "third", ["first", "second"]);
    staying.iter_mut().for_each(|session| session.asks(3));

    assert_eq!(front.try_wait().unwrap(), None, "it is the same process still");
    assert!(herd.proxies().contains(&of_up), "and so is that of `up`");
    staying.into_iter().for_each(Session::leave);
    kill(pid, Signal::TERM).unwrap();
    assert!(front.wait().unwrap().success());
    herd.run(&["down"]);
    herd.wait_gone();
}

/// Root becomes postgres for this one; everybody else stays who they are.
#[test]
fn an_ordinary_user_has_a_herd_too_from_a_file_made_for_other_hosts() {
    let herd = Herd::of_an_ordinary_user();
    let file = herd.dir.parent().unwrap().join("shop.toml");
    let text = |needed: &str| {
        format!(
            "name = \"shop\"\n[postgres]\nversion = 15\nparameters = {{ work_mem = \"{needed}\" }}\n\
             [[witness]]\nname = \"w\"\nhost = \"192.0.2.40\"\n[[cluster]]\nname = \"main\"\n\
             [[cluster.node]]\nname = \"a\"\nhost = \"192.0.2.1\"\n[[cluster.node]]\nname = \"b\"\nhost = \"192.0.2.2\"\n\
             [[cluster.database]]\nname = \"orders\"\nowner = \"clerk\"\n"
        )
    };
    std::fs::write(&file, text("4MB")).unwrap();
    let up = ["up", "--detach", "--herd", file.to_str().unwrap()];
    let said = herd.output(&up);
    let told = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.success(), "{told}");
    assert!(told.contains("127.0.0.1"), "it says where the hosts are: {told}");
    herd.wait_whole();
    let who = wait_for("clients", || herd.sql("select current_user || ' in ' || current_database()"));
    assert_eq!(who, "clerk in orders");
    let owners: Vec<u32> = ["a/data", "pgpass"].iter().map(|path| owner(&herd.dir.join(path))).collect();
    assert!(owners.iter().all(|owner| *owner == owner_of_base(&herd)), "{owners:?}");

    // The store rules: another file is told of and not followed, until it is applied.
    std::fs::write(&file, text("8MB")).unwrap();
    herd.run(&["down"]);
    herd.wait_gone();
    let told = String::from_utf8_lossy(&herd.output(&up).stderr).into_owned();
    assert!(told.contains("differs from what the herd follows"), "{told}");
    herd.wait_whole();
    assert_eq!(herd.sql("show work_mem").unwrap(), "4MB");
    herd.run(&["apply", "--herd", file.to_str().unwrap()]);
    wait_for("the parameter", || match herd.sql("show work_mem")? {
        value if value == "8MB" => Ok(()),
        other => Err(other),
    });
    herd.run(&["down", "--delete", "--yes"]);
    herd.wait_gone();
    assert!(!herd.dir.exists());
}

fn owner_of_base(herd: &Herd) -> u32 {
    owner(herd.dir.parent().unwrap())
}

#[test]
fn a_missing_postgresql_is_told_with_the_way_to_get_it() {
    let herd = Herd::new();
    let file = herd.dir.parent().unwrap().join("herd.toml");
    let text = "name = \"shop\"\n[postgres]\nversion = 14\n[[cluster]]\nname = \"main\"\ndurability = \"async\"\n\
                [[cluster.node]]\nname = \"a\"\nhost = \"192.0.2.1\"\n";
    std::fs::write(&file, text).unwrap();
    if std::path::Path::new("/usr/lib/postgresql/14/bin/initdb").exists() {
        std::fs::write(&file, text.replace("version = 14", "bin_dir = \"/nonexistent\"")).unwrap();
    }
    let refused = herd.output(&["up", "--herd", file.to_str().unwrap()]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{told}");
    assert!(told.contains("hint: "), "{told}");
    assert!(herd.processes().is_empty());
    assert!(!herd.dir.join("ports.json").exists(), "nothing was begun");
}
