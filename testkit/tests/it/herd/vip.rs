//! An address that moves with the gate, as clients, bystanders and kernels see it.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use pgherd_testkit::herd::vip_table;
use pgherd_testkit::process::Process;
use pgherd_testkit::{CLIENT, Session, Whereabouts, wait_until};

use super::*;

/// `lease`, after which nobody has the address whom nobody hears; and what a busy machine may add to any step.
const LEASE: Duration = Duration::from_secs(3);
const BUSY: Duration = Duration::from_secs(1);

/// A client that knows nothing but the address: it connects, asks who answers and writes a row, again and again.
struct Client {
    answered: Arc<Mutex<Vec<(Instant, String)>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Client {
    fn start(herd: &Herd, address: Ipv4Addr) -> Client {
        herd.session(&herd.primary()).run("create table if not exists by_address (at timestamptz)");
        let (answered, stop) = (Arc::<Mutex<Vec<_>>>::default(), Arc::new(AtomicBool::new(false)));
        let (host, login) = (herd.net().client().clone(), herd.login());
        let (told, ends) = (Arc::clone(&answered), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let statement = "insert into by_address values (now()) returning current_setting('cluster_name')";
            while !ends.load(Ordering::Relaxed) {
                let session = Session::open(&host, (address, POSTGRES_PORT).into(), &login);
                let rows = session.and_then(|mut session| session.try_run(statement));
                if let Ok(rows) = rows
                    && let Some(node) = rows.first().and_then(|row| row[0].clone())
                {
                    told.lock().unwrap().push((Instant::now(), node));
                }
                // sleep: a client that is in no hurry.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Client { answered, stop, thread: Some(thread) }
    }

    fn last(&self) -> Option<(Instant, String)> {
        self.answered.lock().unwrap().last().cloned()
    }

    /// Waits until a node other than `old` has taken a write.
    fn moves_from(&self, old: &str) -> String {
        wait_until(&format!("another than {old} to answer by the address"), WHOLE, || match self.last() {
            Some((_, node)) if node != old => Ok(node),
            other => Err(format!("{other:?}")),
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// Waits until everybody agrees on who has it: the node's agent, the kernels, and whoever listened to announcements.
#[track_caller]
fn is_on(herd: &Herd, whereabouts: &Whereabouts, address: Ipv4Addr, node: &str) {
    agent_says(herd, node, "the address to be held", |status| {
        status.cluster().vip.as_ref().is_some_and(|vip| vip.holder.as_deref() == Some(node))
    });
    // What an agent says that was frozen a moment ago may be older than what its kernel has done since.
    held(whereabouts, &[node]);
    let station = herd.host(node).station();
    for bystander in herd.net().hosts().iter().filter(|host| host.name() != node) {
        // Who has never heard of it has nothing to put right.
        let known = bystander.neighbour(address);
        if bystander.name() == CLIENT || known.is_some() {
            assert_eq!(known, Some(station.clone()), "{} sends elsewhere", bystander.name());
        }
    }
}

#[track_caller]
fn held(whereabouts: &Whereabouts, by: &[&str]) {
    wait_until(&format!("it to be on {by:?}"), SOON, || match whereabouts.now() {
        now if now == by => Ok(()),
        now => Err(format!("it is on {now:?}")),
    });
}

#[track_caller]
fn was_on_one_host(whereabouts: &Whereabouts) {
    assert_eq!(whereabouts.overlaps(), [], "it was on two hosts at once");
    let look = whereabouts.longest_look();
    assert!(look < BUSY, "nobody looked for {look:?}");
}

/// Capabilities of a process, any thread of it: permitted, effective, inheritable and ambient together.
fn capabilities(process: &Process, of_threads: bool) -> u64 {
    let paths = match of_threads {
        true => std::fs::read_dir(format!("/proc/{}/task", process.pid()))
            .unwrap()
            .map(|task| task.unwrap().path().join("status"))
            .collect(),
        false => vec![format!("/proc/{}/status", process.pid()).into()],
    };
    let mut all = 0;
    for path in paths {
        let Ok(status) = std::fs::read_to_string(&path) else { continue };
        for set in ["CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
            let line =
                status.lines().find_map(|line| line.strip_prefix(set)).expect("the kernel tells all four");
            all |= u64::from_str_radix(line.trim(), 16).expect("in hexadecimal");
        }
    }
    all
}

#[test]
fn the_address_is_where_clients_are_let_in() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_vip().start();
    let address = herd.net().spare_address();
    let whereabouts = Whereabouts::of(address, herd.net());
    let client = Client::start(&herd, address);
    client.moves_from("nobody");
    is_on(&herd, &whereabouts, address, "a");

    // One thread of the agent may do it, and nothing that the agent has started.
    assert_eq!(capabilities(&herd.agent("a"), false), 0, "the agent's first thread");
    assert_ne!(capabilities(&herd.agent("a"), true), 0, "the one that sets the address");
    let postmaster = herd.postmaster("a");
    assert_eq!(capabilities(&postmaster, true), 0, "PostgreSQL");
    assert_eq!(capabilities(&herd.postgres_process("a", "checkpointer"), true), 0, "its children");
    assert_eq!(capabilities(&herd.fence("a"), true), 0, "the fence");

    // A client that waits for an answer hears that there will be none.
    let login = herd.login();
    let mut waiting = Session::open(herd.net().client(), (address, POSTGRES_PORT).into(), &login).unwrap();
    let asked = Instant::now();
    let waits = std::thread::spawn(move || {
        drop(waiting.ask("select pg_sleep(60)", Duration::from_secs(60)));
        asked.elapsed()
    });
    herd.switch_over(Some("b"));
    assert_eq!(client.moves_from("a"), "b");
    is_on(&herd, &whereabouts, address, "b");
    let waited = waits.join().unwrap();
    assert!(waited < Duration::from_secs(30), "it was left waiting for {waited:?}");
    was_on_one_host(&whereabouts);
    herd.wait_until_whole(WHOLE);

    herd.kill_postmaster("b");
    let next = client.moves_from("b");
    is_on(&herd, &whereabouts, address, &next);
    was_on_one_host(&whereabouts);
    herd.wait_until_whole(WHOLE);

    // Agent, fence and PostgreSQL: nobody is left to remove it but the kernel.
    herd.kill_everything(&next);
    let killed = Instant::now();
    let last = client.moves_from(&next);
    is_on(&herd, &whereabouts, address, &last);
    let stayed = whereabouts.last_on(&next).unwrap().saturating_duration_since(killed);
    assert!(stayed < LEASE + BUSY, "{stayed:?}");
    was_on_one_host(&whereabouts);
    herd.start_agent(&next);
    herd.wait_until_whole(WHOLE);
    is_on(&herd, &whereabouts, address, &last);
    was_on_one_host(&whereabouts);
}

#[test]
fn a_host_that_nobody_hears_has_lost_the_address_before_another_takes_it() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_vip().start();
    let address = herd.net().spare_address();
    let whereabouts = Whereabouts::of(address, herd.net());
    let client = Client::start(&herd, address);
    client.moves_from("nobody");
    is_on(&herd, &whereabouts, address, "a");

    let cut = Instant::now();
    herd.net().isolate("a");
    let next = client.moves_from("a");
    let stayed = whereabouts.last_on("a").unwrap().saturating_duration_since(cut);
    assert!(stayed < LEASE + BUSY, "{stayed:?}");
    is_on(&herd, &whereabouts, address, &next);
    was_on_one_host(&whereabouts);
    herd.net().heal();
    herd.wait_until_whole(WHOLE);
    is_on(&herd, &whereabouts, address, &next);

    // An agent that is frozen for longer than its lease, and for less than its grace: its PostgreSQL goes on, and
    // nobody else leads; but nobody can know that, and nobody but the kernel is left to remove the address.
    let (agent, frozen) = (herd.agent(&next), Instant::now());
    agent.freeze();
    wait_until("the kernel to remove it", LEASE + BUSY, || match whereabouts.now().as_slice() {
        [] => Ok(()),
        still => Err(format!("on {still:?}")),
    });
    let stayed = whereabouts.last_on(&next).unwrap().saturating_duration_since(frozen);
    assert!(stayed > Duration::from_millis(500), "somebody removed it at once: {stayed:?}");
    let thawed = Instant::now();
    agent.thaw();
    // Back after the end of its lease, it goes on if the voters are heard first, and else hands over at once.
    let next = wait_until("writes by the address, once that is decided", WHOLE, || match client.last() {
        Some((at, node)) if at > thawed + BUSY => Ok(node),
        other => Err(format!("{other:?}")),
    });
    is_on(&herd, &whereabouts, address, &next);
    was_on_one_host(&whereabouts);

    // An agent that is killed and comes back at once takes it over, with the connections that use it.
    let login = herd.login();
    let mut session = Session::open(herd.net().client(), (address, POSTGRES_PORT).into(), &login).unwrap();
    session.run("create temporary table mine ()");
    let gaps = whereabouts.gaps_on(&next);
    herd.agent(&next).kill();
    wait_until("the agent to be back", SOON, || {
        // As an init system: what a dead process held is not always free at the moment of its end.
        herd.revive_agents();
        let status = herd.status_from(&next)?;
        let holder = status.cluster().vip.as_ref().and_then(|vip| vip.holder.clone());
        if holder.as_ref() == Some(&next) { Ok(()) } else { Err(format!("it is on {holder:?}")) }
    });
    session.run("select * from mine");
    assert_eq!(whereabouts.gaps_on(&next), gaps, "it was not given up in between");
    was_on_one_host(&whereabouts);
}

#[test]
fn an_address_is_changed_and_removed_by_apply_and_what_is_in_its_way_is_told() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_vip().start();
    let first = herd.net().spare_address();
    let [a, b, c, d] = first.octets();
    let second = Ipv4Addr::new(a, b, c, d + 1);
    let (old, new) = (Whereabouts::of(first, herd.net()), Whereabouts::of(second, herd.net()));
    held(&old, &["a"]);

    // An agent that was given nothing says so, long before it is needed.
    herd.agent("c").kill();
    let told = wait_until("c to say what it lacks", SOON, || {
        if herd.find_agent("c").is_none() {
            herd.start_unprivileged_agent("c");
        }
        let status = herd.status_from("a")?;
        let told = status.cluster().vip.as_ref().is_some_and(|vip| !vip.trouble.is_empty());
        if told { Ok(status) } else { Err(status.to_string()) }
    });
    let trouble = told.cluster().vip.as_ref().unwrap().trouble.join("; ");
    let lacks = "c: this agent was started without CAP_NET_ADMIN and CAP_NET_RAW";
    assert!(trouble.starts_with(lacks), "{trouble}");
    let checked = herd.pgherd("a").arg("check").output();
    assert_eq!(checked.status.code(), Some(1), "a warning: {}", String::from_utf8_lossy(&checked.stdout));

    let file = std::fs::read_to_string(herd.file()).unwrap();
    let changed = herd.net().dir().join("changed.toml");
    let apply = |text: String| {
        std::fs::write(&changed, text).unwrap();
        herd.pgherd("a").args(["apply", "--yes", "--herd"]).arg(&changed).run();
    };
    apply(file.replace(&vip_table(first), &vip_table(second)));
    held(&new, &["a"]);
    held(&old, &[]);
    apply(file.replace(&vip_table(first), ""));
    held(&new, &[]);
    let gone = agent_says(&herd, "a", "nothing of it to be left", |status| status.cluster().vip.is_none());
    assert_eq!(gone.cluster().primary.as_deref(), Some("a"));
    // It still listens on every address, so it is taken without a restart.
    apply(file.clone());
    held(&old, &["a"]);
    let without = |address: &str| {
        let text = file.replace(&format!("{first}/24"), address);
        std::fs::write(&changed, text).unwrap();
        let output = herd.pgherd("a").args(["validate"]).arg(&changed).output();
        assert!(!output.status.success(), "{address} was accepted");
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
    };
    assert!(without(&first.to_string()).contains("has no prefix length"));
    let of_b = herd.host("b").address();
    assert!(without(&format!("{of_b}/24")).contains("is the address of \"b\" itself, which never moves"));
    was_on_one_host(&old);
    was_on_one_host(&new);
}
