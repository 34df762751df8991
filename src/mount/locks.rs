//! One async lock per key: work on different keys goes on in parallel, work on one key is in turn.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Held while working on one key.
pub(super) type KeyGuard = OwnedMutexGuard<()>;

/// Locks by key. A lock exists while somebody holds it or waits for it.
#[derive(Debug)]
pub(super) struct KeyLocks<K>(Mutex<HashMap<K, Weak<AsyncMutex<()>>>>);

impl<K> Default for KeyLocks<K> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<K: Eq + Hash> KeyLocks<K> {
    /// Waits for the key's turn, first come first served.
    pub(super) async fn lock(&self, key: K) -> KeyGuard {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match locks.get(&key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    locks.retain(|_, lock| lock.strong_count() > 0);
                    let lock = Arc::new(AsyncMutex::new(()));
                    locks.insert(key, Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_key_is_in_turn_and_others_do_not_wait() {
        let locks = Arc::new(KeyLocks::default());
        let held = locks.lock("a").await;
        let _other = locks.lock("b").await;
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move { drop(locks.lock("a").await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(held);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn locks_that_nobody_holds_are_forgotten() {
        let locks = KeyLocks::default();
        for key in 0..100 {
            drop(locks.lock(key).await);
        }
        assert!(locks.0.lock().unwrap().len() <= 1);
    }
}
