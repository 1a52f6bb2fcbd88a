//! The newest libpq, which speaks what the server behind the proxy may not know: there is nothing to compare it with, so it is said
//! here what it sees.

use std::fs;
use std::time::Duration;

use pgherd_core::spec::TlsMode;
use pgherd_proxy::{ClientTls, PoolMode};
use tempfile::TempDir;

use crate::harness::{Stand, finish, settings, story};

const FILES: [(&str, &str); 2] = [
    ("newest_libpq.py", include_str!("drivers/python/newest_libpq.py")),
    ("steps.py", include_str!("drivers/python/steps.py")),
];

/// Versions are 10000 times the major one and the minor one, as of `PQfullProtocolVersion`.
const SEEN: &str = "\
libpq: True True
protocol 3.0: 30000 False [7]
protocol 3.2: 30002 False [7]
protocol latest: 30002 False [7]
protocol 3.2 and no less: 30002 True [7]
direct TLS: 30000 True [7]
direct TLS, protocol 3.2: 30002 True [7]
bound: 30000 True [7]
cancel 3.0 postgres: ['57014'] [1]
cancel 3.0 direct: ['57014'] [1]
cancel 3.2 postgres: ['57014'] [1]
cancel 3.2 direct: ['57014'] [1]
pipeline: [[0], [1], [2]]
division: 'refused' '22012' 'DivisionByZero'
behind it: [1]
done
";

story! {
    fn the_newest_libpq_finds_all_that_it_can_do(fetched: "python") {
        let dir = TempDir::new().unwrap();
        for (name, text) in FILES {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let mut with_tls = settings(PoolMode::Transaction);
        with_tls.client_tls = Some(ClientTls::new(vec![made.cert.der().clone()], key, None).unwrap());
        with_tls.client_mode = TlsMode::Prefer;
        let stand = Stand::with(Some(with_tls));
        let mut script = stand.command("/usr/bin/python3");
        script
            .arg(dir.path().join(FILES[0].0))
            .current_dir(&dir)
            .env("PGDATABASE", "postgres")
            .env("PYTHONPATH", fetched)
            .env("PYTHONDONTWRITEBYTECODE", "1");
        let ended = finish(&mut script, Duration::from_secs(150));
        assert_eq!(ended.stdout, SEEN, "{}", ended.stderr);
    }
}
