package redis

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dchannel/dchannel"
)

// The granularity of a lock's time, and a bound that keeps all of its arithmetic
// exact in the numbers of Lua.
const (
	minLock = time.Millisecond
	maxLock = 100 * 365 * 24 * time.Hour
)

// Acquire begins a generation, or lines up. The TTL is rounded up to milliseconds,
// and more than 100 years are 100 years.
//
// It may be repeated; and an attempt whose reply was lost cannot get a lock after
// [Backend.Release], although the server may execute the two in the other order.
func (b *Backend) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	s, err := b.lock(ctx, channel, lockStep{op: "acquire", token: l.Token, ttl: l.TTL, detail: flag(l.Fair), info: l.Info})
	if errors.Is(err, dchannel.ErrUncertain) {
		b.doubts.add(l.Token, time.Now())
	}
	return s, err
}

// Extend sets a new deadline.
func (b *Backend) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
	return b.lock(ctx, channel, lockStep{op: "extend", token: token, ttl: ttl})
}

// Release ends the token's generation, or its place in the line. It works on a server
// that is out of memory, too.
func (b *Backend) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	s, err := b.lock(ctx, channel, lockStep{op: "release", token: token, detail: flag(b.doubts.has(token))})
	if err == nil {
		b.doubts.remove(token)
	}
	return s, err
}

// EndLock ends a generation by its fence. With fence 0 it can be repeated only by who
// does not mind that it ends the next generation, too.
func (b *Backend) EndLock(ctx context.Context, channel string, fence uint64, outcome dchannel.LockOutcome) (dchannel.LockState, error) {
	return b.lock(ctx, channel, lockStep{op: "end", detail: strconv.FormatUint(fence, 10), outcome: outcome})
}

// LockState reads the state, and is the one to end what it finds expired.
func (b *Backend) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	return b.lock(ctx, channel, lockStep{op: "state"})
}

// lockStep is one call of the lock's script.
type lockStep struct {
	op      string
	token   dchannel.ID
	ttl     time.Duration
	detail  string
	outcome dchannel.LockOutcome
	info    string
}

func (b *Backend) lock(ctx context.Context, channel string, step lockStep) (dchannel.LockState, error) {
	token := "" // nobody's
	if step.token != (dchannel.ID{}) {
		token = step.token.String()
	}
	answer, err := b.run(ctx, lockScript,
		append([]string{b.keys.head(channel)}, b.keys.lock(channel)...),
		[]any{step.op, token, millis(min(max(step.ttl, minLock), maxLock)), step.detail, int(step.outcome), b.keys.notices(channel)},
		[]byte(step.info))
	if err == nil {
		var s dchannel.LockState
		if s, err = parseLock(answer); err == nil {
			return s, nil
		}
	}
	if step.op == "state" {
		err = harmless(err)
	}
	return dchannel.LockState{}, fmt.Errorf("redis: lock: %s: %w", step.op, err)
}

var errLockAnswer = fmt.Errorf("%w: the lock script's answer is not understood", dchannel.ErrUncertain)

// parseLock reads the answer that lock.lua describes.
func parseLock(answer string) (s dchannel.LockState, err error) {
	parts := strings.SplitN(answer, "\n", 4)
	if len(parts) != 4 {
		return s, errLockAnswer
	}
	var what string
	var held, mine int
	var ttl, remaining int64
	if _, err := fmt.Sscanf(parts[0], "%s %d %d %d %d %d %d", &what, &s.Fence, &held, &mine, &ttl, &remaining, &s.Waiting); err != nil {
		return dchannel.LockState{}, errLockAnswer
	}
	if what == "closed" {
		return dchannel.LockState{}, dchannel.ErrChanClosed
	}
	s.Held, s.Mine = held == 1, mine == 1
	s.TTL, s.Remaining = time.Duration(ttl)*time.Millisecond, time.Duration(remaining)*time.Millisecond
	for text := range strings.FieldsSeq(parts[1]) {
		var e dchannel.LockEnd
		if _, err := fmt.Sscanf(text, "%d:%d:", &e.Fence, &e.Outcome); err != nil {
			return dchannel.LockState{}, errLockAnswer
		}
		s.Ended = append(s.Ended, e)
	}
	if n, err := hex.Decode(s.Token[:], []byte(parts[2][:min(len(parts[2]), 2*len(s.Token))])); err != nil || 2*n != len(parts[2]) {
		return dchannel.LockState{}, errLockAnswer
	}
	s.Info = parts[3]
	return s, nil
}

func flag(set bool) string {
	if set {
		return "1"
	}
	return "0"
}

// doubts are the tokens with an Acquire that nobody knows the end of. The server may
// find it in a buffer after the Release that follows, and would lock the channel for a
// whole TTL in the name of nobody. So that Release makes the token void; to do that
// for every Release would cost memory on the server.
//
// They are forgotten after one to two minutes: by then the server has read what was
// in its buffers, or has lost the connection.
type doubts struct {
	mu         sync.Mutex
	young, old map[dchannel.ID]struct{}
	youngSince time.Time
}

const doubtLife = time.Minute

func (d *doubts) add(token dchannel.ID, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.young == nil || now.Sub(d.youngSince) > doubtLife {
		d.old, d.young, d.youngSince = d.young, make(map[dchannel.ID]struct{}), now
	}
	d.young[token] = struct{}{}
}

func (d *doubts) has(token dchannel.ID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, young := d.young[token]
	_, old := d.old[token]
	return young || old
}

func (d *doubts) remove(token dchannel.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.young, token)
	delete(d.old, token)
}
