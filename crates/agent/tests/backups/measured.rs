//! What a full backup of a gigabyte costs, beside `tar` and `zstd` with as many threads.
//!
//! Not run by itself: it says numbers, which are for people, and takes minutes.

use std::process::Command;
use std::time::{Duration, Instant};

use pgherd_agent::backups::take::Order;

use crate::harness::story;
use crate::original::{Original, order};

const THREADS: usize = 2;

story! {
    #[ignore = "a measurement, for which the machine has to be idle"]
    async fn a_gigabyte_beside_tar_and_zstd() {
        let original = Original::new(&[]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "65", "-q"]).await;
        original.run("CHECKPOINT").await;
        let data = original.primary().data_dir.clone();
        let whole = original.herd.path().join("whole.tar.zst");
        let pipe = format!(
            "tar -C {} --exclude=./pg_wal -cf - . | zstd -3 -T{THREADS} -q -o {}",
            data.display(),
            whole.display()
        );
        for round in 0..2 {
            let (began, before) = (Instant::now(), cpu("cutime"));
            let piped = Command::new("sh").args(["-c", &pipe]).status().unwrap();
            assert!(piped.success());
            let bytes = std::fs::metadata(&whole).unwrap().len();
            eprintln!("tar, round {round}: {:?}, {:?} of processor, {bytes} bytes", began.elapsed(), cpu("cutime") - before);
            std::fs::remove_file(&whole).unwrap();

            let (began, before) = (Instant::now(), cpu("utime"));
            let taken = original.take(&Order { readers: THREADS, ..order(None) }).await.unwrap();
            let (took, used) = (began.elapsed(), cpu("utime") - before);
            eprintln!("full, round {round}: {took:?}, {used:?} of processor, {} bytes of {}", taken.stored_bytes, taken.read_bytes);
            let (began, before) = (Instant::now(), cpu("utime"));
            let again = Order { readers: THREADS, ..order(Some(taken.manifest.id)) };
            let again = original.take(&again).await.unwrap();
            let (took, used) = (began.elapsed(), cpu("utime") - before);
            eprintln!("incremental, round {round}: {took:?}, {used:?} of processor, {} bytes of {}", again.stored_bytes, again.read_bytes);
        }
    }
}

/// Processor time of this process (`utime`), or of the children that it waited for (`cutime`), the kernel's included.
fn cpu(of: &str) -> Duration {
    const TICKS_PER_SECOND: u64 = 100;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<u64> =
        stat.rsplit(") ").next().unwrap().split(' ').map(|field| field.trim().parse().unwrap_or(0)).collect();
    // The third field of the whole line is the first behind the name.
    let at = if of == "utime" { 11 } else { 13 };
    Duration::from_millis((fields[at] + fields[at + 1]) * 1000 / TICKS_PER_SECOND)
}
