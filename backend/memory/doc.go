// Package memory is a dchannel backend that keeps its logs in this process: the
// reference implementation of [dchannel.Backend], and the test double for code
// that uses channels.
//
//	b := memory.New()
//	defer b.Close()
//	ch := dchannel.New("jobs", b)
//
// A [Store] stands for the server, a [Backend] for one process's connection to it.
// [New] makes one of each; several backends on one store stand for several
// processes:
//
//	server := memory.NewStore()
//	here, there := server.Backend(), server.Backend()
//
// Faults are switched on by methods. Those of the connection belong to the
// backend: [Backend.Cut], [Backend.Heal], [Backend.DropPushes],
// [Backend.LoseReplies]. Those of the server belong to the store: [Store.Pause],
// [Store.Resume], [Store.LoseState], [Store.LoseLast].
//
// Time comes from package time alone and nothing blocks on anything but channels
// and short mutexes, so a test in a testing/synctest bubble runs in fake time. The
// store must be made inside the bubble. No goroutine exists at rest.
//
// # Delivery
//
// An append pushes to the subscriptions of all backends before it returns, on the
// goroutine of the publisher and under the lock of that one channel. So the order
// of pushes is the order of the log, and a sink must not wait for a lock that is
// held while a method of the backend is called.
//
// The last 16,384 messages of a channel are kept, each for 10 minutes
// ([WithRetention]). A frame is dropped as a whole, and only when what stays is
// still as many messages as were asked for.
//
// # Close marker
//
// The marker is the log's last entry and does not count as a message. Once it is
// there nothing expires on its own: the log goes as a whole when the marker's time
// is over. An open log that has not been written to for 24 hours ([WithIdleExpiry])
// goes too; until then its head is known, although its messages have expired, and
// what a listener missed can be counted exactly.
//
// # Locks
//
// The lock of a channel is apart from its log. Its times are exact: a TTL is rounded up
// to a millisecond. It is forgotten a day after its last end, until then the last 8 ends
// are known; fences go on growing, over [Store.LoseState] and for the next store too. The
// line of [dchannel.WithFair] is kept. All fault switches work on it, and
// [Store.ExpireLock] ends a hold as if its time were over.
//
// # Reconnect
//
// There is nothing to reconnect to, except after [Backend.Cut]: the sinks get
// StateInterrupted, and on [Backend.Heal] StateLive and Resync. The same follows
// [Store.LoseState] and [Store.LoseLast], where the two come at once.
//
// # Limits
//
// No limit on a frame's size but the core's. Memory holds what retention keeps;
// trimmed entries are free for the garbage collector at once, expired ones at the
// next use of the channel or within a sixteenth of the retention (at most a
// minute).
//
// A store remembers for as long as its retention that a log was removed or lost, so
// that a retry does not mistake "forgotten" for "never happened".
//
// # Cluster
//
// Does not apply: a store is one server.
//
// # Server versions
//
// Does not apply: the server is this package.
package memory
