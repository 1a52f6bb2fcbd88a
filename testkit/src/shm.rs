//! Shared memory of PostgreSQL servers that were killed.
//!
//! A postmaster makes a small segment of System V's shared memory, to see whether anybody still runs on its data directory
//! (`sysv_shmem.c`), and takes it away when it ends; a killed one does not. A system has 4,096 of them (`SHMMNI`), and when
//! they are used up no PostgreSQL starts any more.

use std::path::Path;
use std::process::Command;

/// `sizeof(PGShmemHeader)`, which is all there is in a segment unless `shared_memory_type` is `sysv`.
const HEADER_BYTES: &str = "56";

/// Removes those that nobody is attached to and whose maker is dead: for PostgreSQL itself they are rubbish.
pub(crate) fn remove_orphans() {
    let listed = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    for id in orphans(&listed, |pid| Path::new("/proc").join(pid).exists()) {
        // Another test process may be removing the same one at this moment.
        let _removed = Command::new("ipcrm").args(["--shmem-id", id]).output();
    }
}

/// Of `/proc/sysvipc/shm`, their numbers.
fn orphans(listed: &str, lives: impl Fn(&str) -> bool) -> Vec<&str> {
    let orphan = |line| {
        let fields: Vec<&str> = str::split_whitespace(line).collect();
        let [_key, id, _permissions, HEADER_BYTES, maker, _last, "0", ..] = fields[..] else { return None };
        (!lives(maker)).then_some(id)
    };
    listed.lines().filter_map(orphan).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_orphan_is_as_large_as_postgresqls_and_nobody_is_attached_to_it_or_can_be() {
        let listed = "\
       key      shmid perms                  size  cpid  lpid nattch   uid   gid
  10018956          4   600                    56 26253 26253      9   101   104
  10035326      65541   600                    56  5093  5099      0   101   104
  10044129      65548   600                    56    77    77      0   101   104
         0      65549   600                393216  5093  5099      0     0     0
";
        assert_eq!(orphans(listed, |pid| pid == "77"), ["65541"]);
        assert_eq!(orphans("", |_| false), [""; 0]);
    }
}
