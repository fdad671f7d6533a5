package etcd

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
)

// generation is what the record key holds, and, without the ends, the hold key.
type generation struct {
	Fence uint64   `json:"fence"`
	Token string   `json:"token"`
	Asked int64    `json:"asked"` // seconds
	TTL   int64    `json:"ttl"`   // seconds, as the server granted them
	Info  string   `json:"info,omitempty"`
	Ended []ending `json:"ended,omitempty"` // newest first
}

type ending struct {
	Fence   uint64 `json:"fence"`
	Token   string `json:"token"`
	Outcome string `json:"outcome"` // in the words of dchannel.LockOutcome
}

// keptEnds is how many ends a record tells of.
const keptEnds = 4

// lockMemory is for how long a record stays behind its generation's end, at the least.
const lockMemory = 24 * time.Hour

// place is a waiter in the line.
type place struct {
	Token string `json:"token"`
	Asked int64  `json:"asked"`
	Info  string `json:"info,omitempty"`

	made  int64 // create revision; 0 for no place
	lease clientv3.LeaseID
}

// lockView is a channel's lock at one revision.
type lockView struct {
	name        string
	record      string // as it is stored, "" for none
	recordLease clientv3.LeaseID
	gen         generation
	held        bool
	lease       clientv3.LeaseID // of the hold
	head        string
	closed      bool
	waiting     int
	first       place
	own         place // of the token that is asked for
}

// lockView reads the lock, and the place of token if it is not empty.
func (b *Backend) lockView(ctx context.Context, name, token string) (v lockView, err error) {
	ops := []clientv3.Op{
		clientv3.OpGet(b.keys.id),
		clientv3.OpGet(b.keys.record(name)),
		clientv3.OpGet(b.keys.hold(name)),
		clientv3.OpGet(b.keys.head(name)),
		clientv3.OpGet(b.keys.line(name), clientv3.WithPrefix(),
			clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend), clientv3.WithLimit(1)),
	}
	if token != "" {
		ops = append(ops, clientv3.OpGet(b.keys.place(name, token)))
	}
	resp, _, err := b.ask(ctx, ops)
	if err != nil {
		return v, err
	}
	v.name = name
	parse := func(kv *mvccpb.KeyValue, into any) {
		if e := json.Unmarshal(kv.Value, into); e != nil && err == nil {
			err = fmt.Errorf("%w: a key of the lock holds something else: %w", dchannel.ErrRefused, e)
		}
	}
	if kv := only(resp[2]); kv != nil {
		v.held, v.lease = true, clientv3.LeaseID(kv.Lease)
		parse(kv, &v.gen) // for who finds no record; else it says the same
	}
	if kv := only(resp[1]); kv != nil {
		v.record, v.recordLease, v.gen = string(kv.Value), clientv3.LeaseID(kv.Lease), generation{}
		parse(kv, &v.gen)
	}
	if kv := only(resp[3]); kv != nil {
		v.head = string(kv.Value)
		t, e := parseTail(kv.Value)
		v.closed, err = t.closed, cmp.Or(err, e)
	}
	takePlace := func(kv *mvccpb.KeyValue, into *place) {
		if kv != nil {
			parse(kv, into)
			into.made, into.lease = kv.CreateRevision, clientv3.LeaseID(kv.Lease)
		}
	}
	takePlace(only(resp[4]), &v.first)
	v.waiting = int(resp[4].GetResponseRange().Count)
	if token != "" {
		takePlace(only(resp[5]), &v.own)
	}
	b.fence.saw(v.gen.Fence)
	return v, err
}

func only(op *pb.ResponseOp) *mvccpb.KeyValue {
	if kvs := op.GetResponseRange().Kvs; len(kvs) > 0 {
		return kvs[0]
	}
	return nil
}

// ended tells how generations ended. A lock that is held by nobody and whose end nobody wrote down
// was ended by its lease: every other end is written in the step that deletes the hold. So this is
// no guess, it does not change any more, and the next generation writes it down.
func (v *lockView) ended() []ending {
	g := &v.gen
	if g.Fence == 0 || v.held || len(g.Ended) > 0 && g.Ended[0].Fence == g.Fence {
		return g.Ended
	}
	return g.endedAs(dchannel.LockExpired)
}

func (g *generation) endedAs(how dchannel.LockOutcome) []ending {
	all := append([]ending{{g.Fence, g.Token, how.String()}}, g.Ended...)
	return all[:min(len(all), keptEnds)]
}

// used tells whether token has had its generation.
func (v *lockView) used(token string) bool {
	for _, e := range v.ended() {
		if e.Token == token {
			return true
		}
	}
	return v.gen.Fence > 0 && v.gen.Token == token
}

// still are the conditions under which generation and hold are as seen. The record's value is compared and not
// its revision: it holds random tokens, and revisions come again after a loss of the data directory.
func (v *lockView) still(k keyspace) []clientv3.Cmp {
	record := clientv3.Compare(clientv3.Value(k.record(v.name)), "=", v.record)
	if v.record == "" {
		record = clientv3.Compare(clientv3.CreateRevision(k.record(v.name)), "=", 0)
	}
	hold := "="
	if v.held {
		hold = ">"
	}
	return []clientv3.Cmp{record, clientv3.Compare(clientv3.CreateRevision(k.hold(v.name)), hold, 0)}
}

// open is the condition that the log has not ended since.
func (v *lockView) open(k keyspace) clientv3.Cmp {
	if v.head == "" {
		return clientv3.Compare(clientv3.CreateRevision(k.head(v.name)), "=", 0)
	}
	return clientv3.Compare(clientv3.Value(k.head(v.name)), "=", v.head)
}

// turn is the condition that the first in line is still the first. Who comes later stands behind.
func (v *lockView) turn(k keyspace) clientv3.Cmp {
	if v.waiting == 0 {
		return clientv3.Compare(clientv3.CreateRevision(k.line(v.name)), "=", 0).WithPrefix()
	}
	return clientv3.Compare(clientv3.CreateRevision(k.place(v.name, v.first.Token)), "=", v.first.made)
}

// state is what callers are told, but for the time left.
func (v *lockView) state(token string) dchannel.LockState {
	s := dchannel.LockState{
		Fence: v.gen.Fence, Held: v.held, Info: v.gen.Info, Waiting: v.waiting,
		TTL:  time.Duration(v.gen.TTL) * time.Second,
		Mine: v.gen.Fence > 0 && token != "" && v.gen.Token == token,
	}
	// So that of all who stand in line only one asks whether it is its turn.
	if id, err := hex.DecodeString(v.gen.Token); err == nil && len(id) == len(s.Token) {
		copy(s.Token[:], id)
	}
	for _, e := range v.ended() {
		s.Ended = append(s.Ended, dchannel.LockEnd{Fence: e.Fence, Outcome: outcome(e.Outcome)})
	}
	return s
}

// since is state when the server began to count the hold's time at t or later. What has passed is taken
// off in the whole seconds in which the server counts.
func (v *lockView) since(t time.Time, token string) dchannel.LockState {
	s := v.state(token)
	s.Remaining = max(s.TTL-time.Since(t).Truncate(time.Second), overdue)
	return s
}

func outcome(word string) dchannel.LockOutcome {
	for o := dchannel.LockReleased; o < dchannel.LockNone; o++ {
		if o.String() == word {
			return o
		}
	}
	return dchannel.LockForced // by a version that knows more ways
}

// overdue is the time left when the lease is over and the hold is still there: the server looks for
// such leases twice a second.
const overdue = 100 * time.Millisecond

// told is the state with the time left, which is another question to the server: it says whole
// seconds, rounded down. The hold is there or it is not; a lease that is gone by now makes the view old.
func (b *Backend) told(ctx context.Context, v lockView, token string) (dchannel.LockState, error) {
	for again := false; ; again = true {
		s := v.state(token)
		if !v.held {
			return s, nil
		}
		k := b.memory.mark()
		resp, err := b.client.TimeToLive(ctx, v.lease)
		if err != nil {
			return dchannel.LockState{}, mapError(ctx, err, false)
		}
		b.observe(k, resp.ResponseHeader)
		if resp.TTL >= 0 {
			s.Remaining = min(time.Duration(resp.TTL+1)*time.Second, max(s.TTL, overdue))
			return s, nil
		}
		if s.Remaining = overdue; again {
			return s, nil
		}
		if v, err = b.lockView(ctx, v.name, token); err != nil {
			return dchannel.LockState{}, err
		}
	}
}

// fences remembers the highest fence that this process has seen of any channel, for when the
// server has lost its own memory.
type fences struct{ highest atomic.Uint64 }

func (f *fences) saw(fence uint64) {
	for {
		old := f.highest.Load()
		if fence <= old || f.highest.CompareAndSwap(old, fence) {
			return
		}
	}
}

// next follows the last one of the channel; without one it is microseconds, so that it is above those that
// were given out before the store lost them.
func (f *fences) next(last uint64) uint64 {
	if last == 0 {
		last = f.highest.Load()
	}
	return max(last+1, uint64(time.Now().UnixMicro()))
}

// wholeSeconds rounds up to what leases count in.
func wholeSeconds(d time.Duration) int64 {
	return max(1, int64((d+time.Second-1)/time.Second))
}

// ownLease is a lease for one key. The call that granted it ends it if it was not used.
type ownLease struct {
	b     *Backend
	id    clientv3.LeaseID
	asked int64
	ttl   int64
	since time.Time
}

// get grants the lease, unless the one from an earlier attempt has all its time (to the second) left.
func (l *ownLease) get(ctx context.Context, asked int64) error {
	if l.id != 0 && l.asked == asked && time.Since(l.since) < time.Second {
		return nil
	}
	l.drop()
	since := time.Now() // before the server starts to count
	resp, err := l.b.client.Grant(ctx, asked)
	if err != nil {
		return mapUnsent(ctx, err)
	}
	l.id, l.asked, l.ttl, l.since = resp.ID, asked, resp.TTL, since
	return nil
}

// keep leaves the lease to what is under it.
func (l *ownLease) keep() { l.id = 0 }

func (l *ownLease) drop() {
	l.b.revoke(l.id)
	l.id = 0
}

// revoke ends a lease under which nothing is any more, aside and if it can be done: it would also
// end by itself.
func (b *Backend) revoke(id clientv3.LeaseID) {
	if id == 0 {
		return
	}
	b.spawn(func() {
		ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(b.ctx), b.opts.probeTimeout)
		defer cancel()
		if _, err := b.client.Revoke(ctx, id); err != nil {
			b.log.Debug("etcd backend: a lease is left to end by itself", "error", err)
		}
	})
}

func encode(v any) string {
	var s strings.Builder
	e := json.NewEncoder(&s)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err) // strings and numbers: it cannot fail
	}
	return strings.TrimSuffix(s.String(), "\n")
}

var errContended = errors.New("others keep changing the lock first")
