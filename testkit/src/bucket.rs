//! A bucket on a host of its own: moto, which speaks S3 and keeps everything in memory. `.ci/conformance` fetches it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::command::give_to_postgres;
use crate::net::Host;
use crate::wait::wait_until;

const BUCKET: &str = "herd";
const PORT: u16 = 5000;
const DEADLINE: Duration = Duration::from_secs(30);

/// Where it is, as a herd file says it in `[backup]`; the keys are in a directory of files.
pub(crate) fn lines(host: &Host, keys: &Path) -> String {
    format!(
        "repository = \"s3://{BUCKET}/story\"\nendpoint = \"http://{}:{PORT}\"\nallow_http = true\n\
         access_key_file = \"{}\"\nsecret_key_file = \"{}\"",
        host.address(),
        keys.join("id").display(),
        keys.join("key").display()
    )
}

/// Starts it, and makes the bucket.
#[track_caller]
pub(crate) fn start(host: &Host, from: &Host, keys: &Path) {
    std::fs::create_dir_all(keys).expect("the directory of the network is there");
    for (name, content) in [("id", "of-a-test"), ("key", "secret-of-a-test")] {
        let file = keys.join(name);
        std::fs::write(&file, content).expect("the directory was just made");
        let only_its_owner = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&file, only_its_owner).expect("the file was just made");
        give_to_postgres(&file);
    }
    let modules = modules();
    assert!(modules.is_dir(), "{} is missing: run .ci/conformance, which fetches it", modules.display());
    let command = host.command("/usr/bin/python3").args(["-m", "moto.server", "-H", "0.0.0.0", "-p"]);
    let command = command.arg(PORT.to_string()).env("PYTHONPATH", &modules);
    command.env("PYTHONDONTWRITEBYTECODE", "1").log_to(&host.dir().join("moto.log")).spawn();
    let address = SocketAddr::from((host.address(), PORT));
    wait_until("moto to make a bucket", DEADLINE, || match from.enter(|| make(address)) {
        Ok(answer) if answer.starts_with("HTTP/1.1 200") => Ok(()),
        Ok(answer) => Err(answer),
        Err(error) => Err(error.to_string()),
    });
}

/// It asks nobody for a signature.
fn make(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, DEADLINE)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(
        stream,
        "PUT /{BUCKET} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=id/20261120/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// In cargo's target directory.
fn modules() -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let places = own.ancestors().skip(1).map(|directory| directory.join("conformance/moto"));
    let last = own.with_file_name("conformance/moto");
    places.into_iter().find(|place| place.is_dir()).unwrap_or(last)
}
