//! A data directory is made, its server started, adopted, stopped and killed.

use std::time::{Duration, Instant};

use pgherd_postgres::control::ControlFile;
use pgherd_postgres::initdb::{InitdbError, initdb};
use pgherd_postgres::process::{Found, StartError, StopMode, Stopped, ensure_gone};
use pgherd_postgres::{MakingError, Server};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Herd, SOON, ask, settings, start, story, superuser};

story! {
    async fn a_server_outlives_its_agent_and_is_adopted() {
        let herd = Herd::new().await;
        let server = herd.initialized("a").await;
        let instance = server.instance().clone();
        let pid = server.pid();
        assert_eq!(ask(&superuser(&instance).await, "SELECT pg_is_in_recovery()").await, "t");
        drop(server);

        let Found::Running(adopted) = Server::find(&instance).await.unwrap() else { panic!("not found") };
        assert_eq!(adopted.pid(), pid);
        assert!(matches!(Server::start(&instance, SOON).await, Err(StartError::AlreadyRunning { .. })));

        assert_eq!(adopted.stop(StopMode::Fast, SOON).await.unwrap(), Stopped::Cleanly);
        assert!(adopted.is_dead());
        assert!(matches!(Server::find(&instance).await.unwrap(), Found::Nothing));
        let control = ControlFile::read(&instance.control_file()).unwrap();
        assert!(control.state.stopped_cleanly() && control.data_checksums, "{control:?}");
    }
}

story! {
    async fn a_directory_that_somebody_filled_is_left_alone_and_a_half_made_one_is_not() {
        let herd = Herd::new().await;
        let instance = herd.node("a").await;
        std::fs::create_dir_all(&instance.data_dir).unwrap();
        std::fs::write(instance.data_dir.join("thesis.txt"), "years of work").unwrap();
        let refused = initdb(&instance, &settings(), &herd.secrets.superuser, SOON).await;
        assert!(matches!(refused, Err(InitdbError::Making(MakingError::NotEmpty { .. }))));
        assert!(instance.data_dir.join("thesis.txt").exists());

        std::fs::remove_file(instance.data_dir.join("thesis.txt")).unwrap();
        // initdb was killed: what it left stands under another name.
        let half = instance.data_dir.with_file_name("data.pgherd_unfinished");
        std::fs::create_dir_all(half.join("base/1")).unwrap();
        assert!(matches!(Server::start(&instance, SOON).await, Err(StartError::NoData { .. })));
        initdb(&instance, &settings(), &herd.secrets.superuser, SOON).await.unwrap();
        assert!(!half.exists());
        start(&instance).await;
    }
}

story! {
    async fn a_crashed_backend_ends_the_server_at_once_and_it_does_not_come_back_by_itself() {
        let herd = Herd::new().await;
        let nodes = herd.cluster("a", &[]).await;
        let a = &nodes[0];
        let mut clients = Vec::new();
        for _ in 0..80 {
            clients.push(a.session().await);
        }
        let victim = clients[40].backend_pid(SOON).await.unwrap();
        let began = Instant::now();
        kill(victim, Signal::KILL);
        tokio::time::timeout(SOON, a.server.dead()).await.unwrap();
        eprintln!("with {} clients the postmaster had ended {:?} after one was killed", clients.len(), began.elapsed());
        ensure_gone(a.instance(), SOON).await.unwrap();
        assert!(matches!(Server::find(a.instance()).await.unwrap(), Found::Nothing));

        // And when it is started again, it is a standby of nobody.
        let again = start(a.instance()).await;
        assert_eq!(ask(&superuser(again.instance()).await, "SELECT pg_is_in_recovery()").await, "t");
    }
}

story! {
    async fn stopped_means_gone_also_for_what_is_frozen_or_orphaned_and_for_nobody_else() {
        let herd = Herd::new().await;
        let server = herd.initialized("a").await;
        let instance = server.instance().clone();
        let frozen = superuser(&instance).await;
        kill(frozen.backend_pid(SOON).await.unwrap(), Signal::STOP);

        // The postmaster is killed alone: a backend that cannot notice stays behind.
        kill(server.pid(), Signal::KILL);
        server.dead().await;
        assert!(server.is_dead());
        let Found::Leftovers(left) = Server::find(&instance).await.unwrap() else { panic!("the backend is gone") };
        assert!(!left.is_empty());
        assert!(matches!(Server::start(&instance, SOON).await, Err(StartError::AlreadyRunning { .. })));

        // Somebody looks around in the data directory, and is none of ours.
        let mut visitor = std::process::Command::new("sleep").arg("60").current_dir(&instance.data_dir).spawn().unwrap();
        let gone = ensure_gone(&instance, SOON).await.unwrap();
        assert!(gone.killed >= 1);
        assert!(visitor.try_wait().unwrap().is_none(), "a visitor was killed");
        visitor.kill().unwrap();
        visitor.wait().unwrap();
        assert!(!instance.data_dir.join("postmaster.pid").exists());

        // A frozen postmaster is killed, too.
        let again = start(&instance).await;
        kill(again.pid(), Signal::STOP);
        let stopped = again.stop(StopMode::Fast, Duration::from_millis(300)).await.unwrap();
        assert_eq!(stopped, Stopped::Killed);
        start(&instance).await;
    }
}

story! {
    async fn a_start_that_fails_says_why() {
        let herd = Herd::new().await;
        let server = herd.initialized("a").await;
        let instance = server.instance().clone();
        server.stop(StopMode::Fast, SOON).await.unwrap();
        let taken = std::net::TcpListener::bind(("127.0.0.1", instance.port)).unwrap();
        let failed = Server::start(&instance, SOON).await.unwrap_err();
        assert!(failed.to_string().contains("Address already in use"), "{failed}");
        assert_eq!(failed.hint(), Some("another program listens on this port: ss -ltnp"));
        drop(taken);

        // A stale file whose number is somebody's by now, as after a reboot.
        let file = instance.data_dir.join("postmaster.pid");
        std::fs::write(&file, format!("{}\n{}\n", std::process::id(), instance.data_dir.display())).unwrap();
        assert!(matches!(Server::find(&instance).await.unwrap(), Found::Nothing));
        start(&instance).await;
    }
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}
