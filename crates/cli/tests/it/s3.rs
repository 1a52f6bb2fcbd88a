//! A repository in a bucket of a server that speaks S3: moto, in a process of its own, and a line to it that fails in every way.
//!
//! moto is fetched by `.ci/conformance`. It is started by whoever may see the build directory; the story runs as who may run PostgreSQL.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::repository::{SOON, Scene, program, said, story_with, wait};
use crate::server::{Server, sql};

/// Where moto listens, in the story.
const MOTO: &str = "PGHERD_TEST_MOTO";

/// Dropping it ends it.
struct Moto(Child);

impl Drop for Moto {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Runs a story with the port of a server that has no bucket yet.
fn with_moto(test: &str, tell: impl FnOnce(u16)) {
    if let Some(port) = std::env::var(MOTO).ok().and_then(|port| port.parse().ok()) {
        return story_with(test, &[], || tell(port));
    }
    let modules = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("conformance").join("moto");
    assert!(modules.is_dir(), "{} is missing: run .ci/conformance, which fetches it", modules.display());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let moto = Command::new("/usr/bin/python3")
        .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
        .env("PYTHONPATH", &modules)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _moto = Moto(moto);
    wait("moto answers", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    story_with(test, &[(MOTO, Path::new(&port.to_string()))], || tell(port));
}

/// One request to moto, which asks nobody for a signature.
fn ask(port: u16, head: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let length = body.len();
    write!(
        stream,
        "{head} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\nConnection: close\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=id/20261120/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[track_caller]
fn make_bucket(port: u16, name: &str) {
    let answer = ask(port, &format!("PUT /{name}"), "");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

fn bucket_file(dir: &Path, port: u16, bucket: &str) -> String {
    let at = |name: &str| dir.join(name).display().to_string();
    for (name, content) in [("id", "test-id"), ("key", "test-key"), ("secret", "a passphrase of a test")] {
        fs::write(at(name), format!("{content}\n")).unwrap();
        fs::set_permissions(at(name), PermissionsExt::from_mode(0o600)).unwrap();
    }
    let file = at(&format!("{bucket}.toml"));
    let text = format!(
        "repository = \"s3://{bucket}/herd\"\nendpoint = \"http://127.0.0.1:{port}\"\nallow_http = true\n\
         access_key_file = \"{}\"\nsecret_key_file = \"{}\"\npassphrase_file = \"{}\"\n",
        at("id"),
        at("key"),
        at("secret")
    );
    fs::write(&file, text).unwrap();
    file
}

/// How often each fault was met.
#[derive(Default)]
struct Faults {
    requests: AtomicUsize,
    errors: AtomicUsize,
    unavailable: AtomicUsize,
    slow: AtomicUsize,
    cut: AtomicUsize,
}

/// A line to moto on a port of its own, and what it does to those who use it; it ends with the test's process.
fn line(to: u16, faults: Option<Arc<Faults>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let faults = faults.clone();
            // What either side ends, ends.
            std::thread::spawn(move || pass_on(client, to, faults.as_deref()).ok());
        }
    });
    port
}

fn pass_on(mut client: TcpStream, to: u16, faults: Option<&Faults>) -> io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        if line == "\r\n" {
            break;
        }
        if !lower.starts_with("connection:") {
            head += &line;
        }
        // Amazon wants this one where objects are locked, or Content-MD5; moto wants it to be named by another header.
        if lower.starts_with("x-amz-checksum-sha256:") {
            head += "x-amz-sdk-checksum-algorithm: SHA256\r\n";
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let count = |of: &AtomicUsize| of.fetch_add(1, Ordering::Relaxed);
    let turn = faults.map(|met| (count(&met.requests) % 12, met));
    let refused = match turn {
        Some((2, met)) => Some(("500 Internal Server Error", &met.errors)),
        Some((5, met)) => Some(("503 Slow Down", &met.unavailable)),
        _ => None,
    };
    if let Some((status, met)) = refused {
        count(met);
        return write!(client, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let mut server = TcpStream::connect(("127.0.0.1", to))?;
    write!(server, "{head}Connection: close\r\n\r\n")?;
    server.write_all(&body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    match turn {
        Some((8, met)) => {
            count(&met.slow);
            for piece in answer.chunks(answer.len() / 5 + 1) {
                client.write_all(piece)?;
                // sleep: that is the fault.
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        }
        Some((11, met)) => {
            count(&met.cut);
            client.write_all(&answer[..answer.len() - answer.len() / 3])
        }
        _ => client.write_all(&answer),
    }
}

/// Over a line that fails a command may fail; it says so, and the next one does it.
#[track_caller]
fn done_in_the_end(scene: &Scene, arguments: &[&str]) -> String {
    let began = Instant::now();
    loop {
        let output = scene.call(arguments);
        if output.status.success() {
            return String::from_utf8(output.stdout).unwrap();
        }
        let said = said(&output);
        assert!(said.contains("error: ") && began.elapsed() < SOON, "{arguments:?}: {said}");
        eprintln!("{arguments:?} is asked for again: {said}");
    }
}

#[test]
fn as_root_a_bucket_behind_a_line_that_fails_has_everything_in_the_end() {
    let name = "s3::as_root_a_bucket_behind_a_line_that_fails_has_everything_in_the_end";
    with_moto(name, |port| {
        make_bucket(port, "shop");
        let faults = Arc::new(Faults::default());
        let bad = line(port, Some(Arc::clone(&faults)));
        let place = tempfile::tempdir().unwrap();
        let scene = Scene::over(bucket_file(place.path(), bad, "shop"), place);
        let data_dir = scene.server.data_dir().display().to_string();
        let create = ["backup", "create", "--fast", "--data-dir", &data_dir, "--json"];
        let backup = |told: &str| -> Value { serde_json::from_str(told).unwrap() };
        scene.write(3);
        let first = backup(&done_in_the_end(&scene, &create));
        scene.write(3);
        let second = backup(&done_in_the_end(&scene, &create));
        assert_eq!(second["backup"]["mode"], "incremental");
        let last = scene.write(3)[2];
        scene.archive_everything();
        let listed = done_in_the_end(&scene, &["backup", "list"]);
        for taken in [&first, &second] {
            assert!(listed.contains(taken["backup"]["id"].as_str().unwrap()), "{listed}");
        }
        done_in_the_end(&scene, &["backup", "verify"]);

        let to = scene.at("restored");
        done_in_the_end(&scene, &["restore", "--to", &to, "--delta", "--yes"]);
        let copy = Server::over(PathBuf::from(&to));
        wait("recovery ends", || sql(&copy, "SELECT pg_is_in_recovery()") == "f");
        assert_eq!(sql(&copy, "SELECT count(*) || ' ' || max(xid) FROM ledger"), format!("9 {last}"));
        // The last one lets go of what the first one had.
        done_in_the_end(&scene, &["backup", "delete", "first", "--yes"]);
        done_in_the_end(&scene, &["backup", "verify", "last"]);
        for (kind, met) in [
            ("500", &faults.errors),
            ("503", &faults.unavailable),
            ("slow", &faults.slow),
            ("cut", &faults.cut),
        ] {
            let times = met.load(Ordering::Relaxed);
            eprintln!("{kind}: {times} of {} requests", faults.requests.load(Ordering::Relaxed));
            assert!(times >= 3, "{kind} was met {times} times");
        }
    });
}

#[test]
fn as_root_case_30_a_bucket_that_lets_nothing_go_keeps_what_was_deleted() {
    let name = "s3::as_root_case_30_a_bucket_that_lets_nothing_go_keeps_what_was_deleted";
    with_moto(name, |port| {
        let made =
            ask(port, "PUT /locked HTTP/1.1\r\nx-amz-bucket-object-lock-enabled: true\r\nX-Unused:", "");
        assert!(made.starts_with("HTTP/1.1 200"), "{made}");
        let rule = "<ObjectLockConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><ObjectLockEnabled>Enabled\
                    </ObjectLockEnabled><Rule><DefaultRetention><Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule>\
                    </ObjectLockConfiguration>";
        let ruled = ask(port, "PUT /locked?object-lock", rule);
        assert!(ruled.starts_with("HTTP/1.1 200"), "{ruled}");
        let place = tempfile::tempdir().unwrap();
        let scene = Scene::over(bucket_file(place.path(), line(port, None), "locked"), place);
        scene.write(1);
        let taken = scene.back_up(&[]);
        scene.archive_everything();
        let versions = || {
            let listed = ask(port, "GET /locked?versions&max-keys=100000", "");
            (listed.matches("<Version>").count(), listed.matches("<DeleteMarker>").count())
        };
        let (before, probed) = versions();
        assert!(before > 5, "{before} versions");
        // What has to go goes out of sight, and is there for whoever asks for its version.
        let new = scene.at("new");
        fs::write(&new, "another passphrase\n").unwrap();
        fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
        scene.told(&["backup", "rekey", "--passphrase-file", &new]);
        scene.told(&["backup", "verify"]);
        fs::rename(&new, scene.at("secret")).unwrap();
        scene.told(&["backup", "rekey", "--retire", "--yes"]);
        let (after, deleted) = versions();
        assert_eq!(deleted, probed + 1, "the former wrapping");
        assert!(after > before, "every version is still there: {before} and {after}");
        let listed = scene.told(&["backup", "list"]);
        assert!(listed.contains(taken["id"].as_str().unwrap()), "{listed}");
        scene.told(&["backup", "verify"]);
        fs::write(scene.at("secret"), "a passphrase of a test\n").unwrap();
        let (_, text) = scene.refused(&["backup", "list"]);
        assert!(text.contains("is not the one they were wrapped with"), "{text}");
        fs::write(scene.at("secret"), "another passphrase\n").unwrap();
        let output = program().args(["backup", "check", "--repository", &scene.repository]).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    });
}
