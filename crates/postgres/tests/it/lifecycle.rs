//! A data directory is made, its server started, adopted, stopped and killed.

use pgherd_postgres::control::ControlFile;
use pgherd_postgres::initdb::{InitdbError, initdb};
use pgherd_postgres::process::{Found, StartError, StopMode, Stopped};
use pgherd_postgres::{MakingError, Server};

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
