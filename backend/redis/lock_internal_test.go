package redis

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
)

func TestDoubtsAreForgotten(t *testing.T) {
	var d doubts
	now := time.Now()
	one, two, three := dchannel.NewID(), dchannel.NewID(), dchannel.NewID()
	require.False(t, d.has(one))
	d.remove(one)
	d.add(one, now)
	d.add(two, now.Add(doubtLife))
	d.add(three, now.Add(doubtLife+1))
	for _, token := range []dchannel.ID{one, two, three} {
		require.True(t, d.has(token))
	}
	d.remove(one)
	d.remove(three)
	require.False(t, d.has(one) || d.has(three))
	d.add(three, now.Add(3*doubtLife))
	require.False(t, d.has(two))
	require.Len(t, d.young, 1)
	require.Empty(t, d.old)
}

func TestParseLockNeverCrashes(t *testing.T) {
	token := dchannel.NewID()
	s, err := parseLock("ok 7 1 0 1500 3 2\n6:1:t 5:2:t \n" + token.String() + "\nin\nfo")
	require.NoError(t, err)
	require.Equal(t, dchannel.LockState{
		Fence: 7, Held: true, TTL: 1500 * time.Millisecond, Remaining: 3 * time.Millisecond, Info: "in\nfo", Waiting: 2, Token: token,
		Ended: []dchannel.LockEnd{{Fence: 6, Outcome: dchannel.LockReleased}, {Fence: 5, Outcome: dchannel.LockExpired}},
	}, s)
	_, err = parseLock("closed 7 1 0 1500 3 2\n\n\n")
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
	for _, junk := range []string{"", "\n\n", "ok", "ok 1 1 1 1 1 1",
		"ok 1 1 1 1 1 1\n\n", "ok 1 1 1 1 1\n\n\n", "ok x 1 1 1 1 1\n\n\n", "ok 1 1 1 1 1 1\n1\n\n", "ok 1 1 1 1 1 1\n1:256:t\n\n", "ok -1 1 1 1 1 1\n\n\n",
		"ok 1 1 1 1 1 1\n\nabc\n", "ok 1 1 1 1 1 1\n\nx\n", "ok 1 1 1 1 1 1\n\n" + token.String() + "00\n",
	} {
		s, err := parseLock(junk)
		require.ErrorIs(t, err, dchannel.ErrUncertain, "%q", junk)
		require.Zero(t, s)
	}
}
