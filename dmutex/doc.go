// Package dmutex is a mutex for many processes, on the Redis, NATS or etcd that a
// deployment has already, or in memory.
//
//	m := dmutex.New("token:refresh", 30*time.Second, b)
//	defer m.Close()
//	err := m.Lock()
//	…
//	err = m.Unlock()
//
// # A lease, not a lock
//
// Who holds the lock may die, so a lock ends by itself, when its ttl is over by the
// server's clock; [WithAutoExtend] renews it for as long as the holder lives. That is the
// one thing to know, for it means that a holder can lose its lock and not know:
//
//	A locks, reads 7, and stands still: a long garbage collection, a paused machine
//	the ttl is over, B locks, writes 8, unlocks
//	A goes on, and writes what it made of the 7
//
// No lock with a time can prevent this, on any server: between A's last look at its lock
// and its write there is always time to stand still. Nor does it hold through a server's
// failover with asynchronous replication, or a jump of its clock. The lock saves work; what
// must not be written twice needs the fence as well.
//
// # Fencing
//
// Each lock of a key has a number, [Mutex.Fence], higher than all before. Send it with
// what is written, and have the storage refuse what comes with a lower number than it has
// seen. Reads are part of this: who reads, then writes, shows its fence with the read too,
// so that an older holder cannot write from there on. In SQL:
//
//	UPDATE account SET fence = $1 WHERE id = $2 AND fence <= $1 RETURNING balance
//	UPDATE account SET balance = $3 WHERE id = $2 AND fence = $1
//
// Where either changes no row, somebody else has had the lock since: give up.
//
// # Working under the lock
//
// [Mutex.Context] ends when the lock is over, a little before the server's time is: pass
// it on to the work. [Mutex.Unlock] returns nil if the lock was held all the time, and
// dchannel.ErrLockExpired or dchannel.ErrLockLost (both dchannel.ErrNotHeld) if what was
// done may not have been done alone. So its error is worth a look.
//
// A Mutex is also a sync.Mutex for its own process: of those who use one value, one has
// it, from Lock to Unlock, even if the lock's time runs out in between. So each Lock and
// TryLock that returns nil needs its Unlock, and an Unlock never ends somebody else's
// lock. Two values for one key, in one process or two, are as good as strangers.
//
// # One does it, the others wait
//
// Many processes see that a token is about to expire; one is to refresh it. [Do] is the
// whole loop, with the cases that are easily forgotten (the result that came between
// looking and locking, the holder that dies). By hand:
//
//	for {
//		token, ok := read()
//		if ok {
//			return token
//		}
//		if err := m.TryLock(); errors.Is(err, dchannel.ErrLocked) {
//			expired, err := m.WaitUntilUnlocked(ctx) // of the very lock that TryLock met
//			continue                                 // look again, whatever expired says
//		}
//		// read again, refresh with m.Fence(), m.Unlock()
//	}
//
// # On the server
//
// The lock is that of the channel named after the key ([dchannel.Channel.LockFor]), apart
// from its messages; docs/locks.md says more of it. Unlock is its CloseLockedUntil. The
// channel is never closed by this package, and should not be by others: a closed channel
// cannot be locked, until the close is forgotten. Keys are 1 to 255 bytes of UTF-8 without control characters.
//
// A Mutex has no connection and no goroutine of its own. While locked it has a timer, and
// one goroutine more with WithAutoExtend and with [WithLossWatch] each. All who wait for
// a key by one backend value share one watch.
package dmutex
